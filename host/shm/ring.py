"""A ring out: memory the backend writes distributions into and an inferlet maps read-only.

The order makes it safe: `create_ring` (host), `RingWriter` (backend), `seal_ring` (host), and only
then does the inferlet get the descriptor. After the seal no new writable mapping can be made of
it, by nobody, while the writer's own goes on working; and no one can shrink it under the writer.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Final

F_SEAL_FUTURE_WRITE: Final = 0x0010  # linux/fcntl.h; Python's fcntl has no name for it


def create_ring(name: str, size: int) -> int:
    """A descriptor of a zeroed memfd of `size` bytes whose size is fixed.

    ValueError if `size` is not a positive multiple of the page size. The caller closes it.
    """
    if size <= 0 or size % mmap.PAGESIZE:
        raise ValueError(f"a ring of {size} bytes: give a positive multiple of {mmap.PAGESIZE}")
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except BaseException:
        os.close(fd)
        raise
    return fd


def seal_ring(fd: int) -> None:
    """Makes the ring read-only for everyone but those who have mapped it for writing already."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)


class RingWriter:
    """The writer's mapping of a ring. It only ever writes: what lies in a ring is not read back."""

    def __init__(self, fd: int, size: int) -> None:
        """Maps `size` bytes of `fd` for writing; `fd` may be closed afterwards.

        ValueError if the file is not of that size or could be shrunk (a write would be SIGBUS).
        """
        if os.fstat(fd).st_size != size:
            raise ValueError(f"the ring has {os.fstat(fd).st_size} bytes, {size} were announced")
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ValueError("the ring could be shrunk while it is written: seal its size first")
        self.size = size
        self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)

    def write(self, offset: int, data: bytes) -> bool:
        """Copies `data` to `offset`; False, and nothing written, if it would not fit."""
        if offset < 0 or offset + len(data) > self.size:
            return False
        self._map[offset : offset + len(data)] = data
        return True

    def close(self) -> None:
        self._map.close()
