"""Looks at an executable before it is run, so that a refusal says why and W^X holds from the start.

Reads headers only, and trusts none: the file is the attacker's. Format: System V ABI, "Object
Files"; /usr/include/elf.h. What counts is how the kernel reads them (fs/binfmt_elf.c).
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from pathlib import Path
from typing import Final

from .failure import SpawnRefused

_HEADER = struct.Struct("<16sHHIQQQIHHH")  # e_ident ... e_phnum
_SEGMENT = struct.Struct("<IIQQQQQQ")  # Elf64_Phdr: type, flags, offset, vaddr, paddr, filesz, ...
_X86_64: Final = 62
_MACHINES: Final = {
    3: "32-bit x86", 8: "MIPS", 21: "POWER", 22: "S/390", 40: "32-bit ARM", 183: "ARM (aarch64)",
    243: "RISC-V", 258: "LoongArch",
}  # fmt: skip
_PT_LOAD, _PT_INTERP, _PT_GNU_STACK = 1, 3, 0x6474E551
_PF_X, _PF_W = 1, 2
_MAX_SEGMENTS: Final = 128
_MAX_INTERPRETER: Final = 4096
LINKER_FOLDERS: Final = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")


def interpreter(path: str) -> str | None:
    """The dynamic linker that the executable at `path` asks for; None if it is static.

    SpawnRefused if it is not there, not executable, not for this machine, wants memory that is
    writable and executable at once, or a linker that is not the system's.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        hint = "check the path" if error.errno == errno.ENOENT else "check its permissions"
        raise _refused(path, error.errno or 0, os.strerror(error.errno or 0), hint) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _refused(
                path, errno.EACCES, "it is no regular file", "give an executable or a script"
            )
        if not os.access(path, os.X_OK):
            raise _refused(path, errno.EACCES, "it has no execute permission", f"chmod +x {path}")
        return _read(fd, path)
    finally:
        os.close(fd)


def _read(fd: int, path: str) -> str | None:
    head = os.pread(fd, _HEADER.size, 0)
    if head[:2] == b"#!":
        raise _refused(
            path,
            errno.ENOEXEC,
            "it is a script with #!, which would need a second program to run",
            "give it as a script of its language, or compile it",
        )
    if head[:4] != b"\x7fELF" or len(head) < _HEADER.size:
        raise _refused(
            path,
            errno.ENOEXEC,
            "it is not an ELF executable",
            "give an executable, or a script with a suffix or a #! line that says its language",
        )
    ident, _, machine, _, _, offset, _, _, _, entry_size, count = _HEADER.unpack(head)
    if ident[4] != 2 or ident[5] != 1 or machine != _X86_64:
        built_for = _MACHINES.get(machine, f"ELF machine {machine}")
        if machine == _X86_64:
            built_for = "x86_64 in a 32-bit (x32) or big-endian form"
        raise _refused(
            path,
            errno.ENOEXEC,
            f"it is built for {built_for}, this machine is 64-bit x86_64",
            "build it on, or for, this machine",
        )
    if entry_size != _SEGMENT.size or not 0 < count <= _MAX_SEGMENTS:
        raise _refused(path, errno.ENOEXEC, "it has no program headers", "link it as an executable")
    table = _read_at(fd, count * entry_size, offset)
    if len(table) < count * entry_size:
        raise _refused(path, errno.ENOEXEC, "it is cut short", "build or copy it again")
    linker: str | None = None
    for kind, flags, at, _, _, size, _, _ in _SEGMENT.iter_unpack(table):
        if kind == _PT_INTERP and linker is None:  # of several the kernel takes the first
            linker = os.fsdecode(_read_at(fd, min(size, _MAX_INTERPRETER), at).split(b"\0")[0])
        elif kind == _PT_GNU_STACK and flags & _PF_X:
            raise _writable_code(path, "an executable stack")
        elif kind == _PT_LOAD and flags & _PF_X and flags & _PF_W:
            raise _writable_code(path, "a segment that is writable and executable")
    return None if linker is None else _system_linker(path, linker)


def _read_at(fd: int, size: int, offset: int) -> bytes:
    try:
        return os.pread(fd, size, offset)
    except (OSError, OverflowError):  # no file reaches that far
        return b""


def _system_linker(path: str, linker: str) -> str:
    """The real path of `linker`. The inferlet may read and execute it, so it must not be a file or
    folder of the attacker's choice."""
    real = Path(os.path.realpath(linker))
    if not real.is_file():
        raise _refused(
            path,
            errno.ENOENT,
            f"its dynamic linker {linker} is not on this machine",
            "link it statically (-static), or build it on this machine",
        )
    if not any(real.is_relative_to(os.path.realpath(folder)) for folder in LINKER_FOLDERS):
        raise _refused(
            path,
            errno.EACCES,
            f"its dynamic linker {linker} is not one of the system's",
            f"link it statically (-static), or with a linker in {' or '.join(LINKER_FOLDERS)}",
        )
    return str(real)


def _writable_code(path: str, what: str) -> SpawnRefused:
    return _refused(
        path,
        errno.EACCES,
        f"it asks for {what}, which the sandbox never grants",
        "link it with -z noexecstack and without -N or --omagic",
    )


def _refused(path: str, code: int, why: str, hint: str) -> SpawnRefused:
    return SpawnRefused("exec", code, f"{path} cannot be run: {why}", hint)
