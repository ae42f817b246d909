"""Blocks that are written once and then never change: start-up block, vocabulary, tokenizer."""

from __future__ import annotations

import fcntl
import os


def sealed_memfd(name: str, data: bytes | memoryview) -> int:
    """A descriptor of a memfd that holds `data` for ever: SHRINK, GROW, WRITE and SEAL are set.

    The file offset is 0. The caller closes it. OSError if memory or descriptors are used up.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.lseek(fd, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd
