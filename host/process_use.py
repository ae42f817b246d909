"""What a process uses, as the kernel tells of it in /proc/PID."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

from msgspec import Struct

_TICKS: Final = os.sysconf("SC_CLK_TCK")  # a second
_PAGE: Final = os.sysconf("SC_PAGESIZE")


class ProcessUse(Struct, frozen=True):
    cpu_seconds: float = 0.0  # user and system
    memory: int = 0  # resident, in octets
    address_space: int = 0  # in octets
    threads: int = 0
    state: str = ""  # of the first thread: "R", "S", "T" and so on, as ps(1) shows it


def process_use(pid: int) -> ProcessUse:
    """Nothing of a process that is not there."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ProcessUse()
    try:
        stat = os.read(fd, 4096)
    except OSError:  # it has just been reaped
        return ProcessUse()
    finally:
        os.close(fd)
    # proc_pid_stat(5), from field 3 on: the name before it may hold anything
    fields = stat.rpartition(b")")[2].split()
    return ProcessUse(
        cpu_seconds=(int(fields[11]) + int(fields[12])) / _TICKS,
        threads=int(fields[17]),
        state=fields[0].decode(),
        address_space=int(fields[20]),
        memory=int(fields[21]) * _PAGE,
    )


def has_children(pid: int) -> bool:
    """False of a process that is not there."""
    with contextlib.suppress(OSError):
        return any(file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children"))
    return False


def open_files(pid: int) -> int | None:
    """None if we may not know."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208
    except OSError:
        return None
