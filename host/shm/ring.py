"""Rings: memory that an inferlet shares with the backend, one ring for each direction.

**Ring out** is written by the backend and read by the inferlet. The order makes it safe:
`create_ring` (host), `RingWriter` (backend), `seal_ring` (host), and only then does the inferlet
get the descriptor. After the seal no new writable mapping can be made of it, by nobody, while the
writer's own goes on working; and no one can shrink it under the writer.

**Ring in** is written by the inferlet and read by the backend. `create_ring_in` fixes its size and
its seals at once; what lies in it may change while it is read, so a `RingReader` copies first.
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
    return _create(name, size, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)


def create_ring_in(name: str, size: int) -> int:
    """As `create_ring`; and nobody can add a seal, so that it stays writable for its inferlet."""
    return _create(name, size, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)


def _create(name: str, size: int, seals: int) -> int:
    if size <= 0 or size % mmap.PAGESIZE:
        raise ValueError(f"a ring of {size} bytes: give a positive multiple of {mmap.PAGESIZE}")
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def seal_ring(fd: int) -> None:
    """Makes the ring read-only for everyone but those who have mapped it for writing already."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)


def _map(fd: int, size: int, protection: int) -> mmap.mmap:
    """ValueError if the file is not of that size or could be shrunk (an access would be SIGBUS)."""
    if os.fstat(fd).st_size != size:
        raise ValueError(f"the ring has {os.fstat(fd).st_size} bytes, {size} were announced")
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise ValueError("the ring could be shrunk while it is used: seal its size first")
    return mmap.mmap(fd, size, mmap.MAP_SHARED, protection)


class RingWriter:
    """The writer's mapping of a ring out. It only ever writes: what lies there is not read back."""

    def __init__(self, fd: int, size: int) -> None:
        """Maps `size` bytes of `fd` for writing; `fd` may be closed afterwards.

        ValueError if the file is not of that size or could be shrunk.
        """
        self.size = size
        self._map = _map(fd, size, mmap.PROT_READ | mmap.PROT_WRITE)

    def write(self, offset: int, data: bytes) -> bool:
        """Copies `data` to `offset`; False, and nothing written, if it would not fit."""
        if offset < 0 or offset + len(data) > self.size:
            return False
        self._map[offset : offset + len(data)] = data
        return True

    def close(self) -> None:
        self._map.close()


class RingReader:
    """The reader's mapping of a ring in. Its writer is hostile and may write at any moment."""

    def __init__(self, fd: int, size: int) -> None:
        """Maps `size` bytes of `fd` for reading; `fd` may be closed afterwards.

        ValueError if the file is not of that size or could be shrunk.
        """
        self.size = size
        self._map = _map(fd, size, mmap.PROT_READ)

    def read(self, offset: int, length: int) -> bytes | None:
        """A copy, made once, of `length` bytes at `offset`; None if they do not all lie inside."""
        if offset < 0 or length < 0 or offset + length > self.size:
            return None
        return self._map[offset : offset + length]

    def close(self) -> None:
        self._map.close()
