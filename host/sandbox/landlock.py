"""Landlock: which files an inferlet may open. Nothing is writable, whatever the profile.

It also scopes abstract unix sockets and signals where the kernel can (ABI 6), and makes a process
untraceable from outside its own domain, so siblings cannot open each other's /proc/PID/mem.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterable
from typing import Final

from . import kernel

EXECUTE: Final = 1 << 0
READ_FILE: Final = 1 << 2
READ_DIR: Final = 1 << 3
_ALL_OF_ABI_1: Final = (1 << 13) - 1
_REFER: Final = 1 << 13  # ABI 2
_TRUNCATE: Final = 1 << 14  # ABI 3
_TCP: Final = 0b11  # bind and connect, ABI 4
_IOCTL_DEV: Final = 1 << 15  # ABI 5
_SCOPE: Final = 0b11  # abstract unix sockets and signals, ABI 6


def attributes(abi: int) -> bytes:
    """struct landlock_ruleset_attr that handles, so denies, all that version `abi` knows."""
    files = _ALL_OF_ABI_1
    files |= _REFER * (abi >= 2) | _TRUNCATE * (abi >= 3) | _IOCTL_DEV * (abi >= 5)
    packed = struct.pack("<Q", files)
    if abi >= 4:
        packed += struct.pack("<Q", _TCP)
    if abi >= 6:
        packed += struct.pack("<Q", _SCOPE)
    return packed


class Landlock:
    """Makes rulesets. `available` is False where the kernel has no Landlock; `errno` says why."""

    def __init__(self) -> None:
        self.errno = 0
        self.abi = 0
        try:
            self.abi = kernel.landlock_abi()
        except OSError as error:
            self.errno = error.errno or 0
        self._attributes = attributes(self.abi)

    @property
    def available(self) -> bool:
        return self.abi > 0

    def ruleset(self, readable: Iterable[str], executable: Iterable[str] = ()) -> int:
        """A descriptor that grants reading of files and folders, and executing some; the caller
        closes it. A path that does not exist grants nothing. OSError otherwise."""
        ruleset = kernel.landlock_create(self._attributes)
        try:
            for path in readable:
                _grant(ruleset, path, READ_FILE | READ_DIR)
            for path in executable:
                _grant(ruleset, path, READ_FILE | EXECUTE)
        except BaseException:
            os.close(ruleset)
            raise
        return ruleset


def _grant(ruleset: int, path: str, access: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            access &= ~READ_DIR  # the kernel refuses it for a file
        kernel.landlock_allow(ruleset, fd, access)
    finally:
        os.close(fd)
