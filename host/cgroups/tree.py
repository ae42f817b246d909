"""One host's subtree of control groups: `piehost-PID` in each hierarchy, a child for each inferlet.

Whose host is dead is known by a lock: the host holds flock on the folder, and the kernel drops it
with the process. A pid would not do: it is used again, and means nothing in another container.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from .limits import V2, Controller, GroupLimits, GroupUsage, Setting
from .places import Places

_PREFIX: Final = "piehost-"
_LAUNCHERS: Final = "launchers"
_HOST: Final = "host"
_CLAIMS: Final = 100  # of a new folder, before we give up


class Tree:
    """On disk from the constructor on; OSError if that is not possible. Not for two threads."""

    def __init__(self, places: Places, memory: int | None) -> None:
        """`memory`: the cap of all groups together, in octets; None: three quarters of what the
        machine has, or of what our own group may have."""
        self._version = places.version
        self._above = places.folders
        self._locks: list[int] = []
        self._ours: list[Path] = []  # groups of processes of the server (v2)
        self._left = False  # our own group, for one of `_ours` (v2)
        name = self._free_name()
        self._roots = {c: folder / name for c, folder in self._above.items()}
        try:
            if self._version is V2:
                self._leave()
            for root in _distinct(self._roots.values()):
                self._locks.append(_claim(root))
            if self._version is V2:
                _enable(self._roots["memory"])
            self._write(self._version.of_all(memory or _three_quarters(places)), self._roots)
        except OSError:
            self.close()
            raise

    def _free_name(self) -> str:
        """The host's pid is for people; a process of another pid namespace may have the same."""
        names = (f"{_PREFIX}{os.getpid()}{mark}" for mark in ("", *range(-1, -1000, -1)))
        return next(n for n in names if not any((f / n).exists() for f in self._above.values()))

    def _leave(self) -> None:
        """v2: a group with groups that are controlled holds no processes itself, but for the
        root; so we move into one of our own, if nobody else is there."""
        above = self._above["memory"]
        if not (above / "cgroup.procs").exists():
            raise OSError(errno.ENODEV, "it was removed, or another file system is mounted over it")
        if (above / "cgroup.type").exists():  # all but the root have it
            pids = {int(line) for line in (above / "cgroup.procs").read_text().split()}
            if pids - {os.getpid()}:
                raise OSError(errno.EBUSY, f"other processes live in the group {above}")
            self.separate(_HOST, os.getpid())
            self._left = True
        _enable(above)

    def separate(self, name: str, pid: int) -> None:
        """Gives a process of the server a group of its own beside the inferlets', so that it weighs
        as much as if there were no other. In v1 it does already: there a group may hold processes
        beside groups, and each has its own weight."""
        if self._version is V2:
            root = self._roots["cpu"]
            folder = root.with_name(f"{root.name}.{name}")
            folder.mkdir(exist_ok=True)
            if folder not in self._ours:
                self._ours.append(folder)
            _put(folder / "cgroup.procs", str(pid))

    def put_server_first(self) -> None:
        """All groups together weigh little against the processes of the server."""
        self._write([self._version.weight], self._roots)

    def folder(self, name: str, controller: Controller) -> Path:
        return self._roots[controller] / name

    def folders(self, name: str) -> list[Path]:
        """Of the group called so, in each hierarchy."""
        return [root / name for root in _distinct(self._roots.values())]

    def make(self, name: str) -> None:
        for folder in self.folders(name):
            folder.mkdir()

    def limit(self, name: str, limits: GroupLimits) -> None:
        """OSError (EBUSY) if it holds more memory than that already, and v1 cannot take it back."""
        folders = {controller: self.folder(name, controller) for controller in self._roots}
        self._write(self._version.limits(limits), folders)

    def attach(self, name: str, pid: int) -> None:
        """All threads of the process; their memory stays charged to where they come from.
        ProcessLookupError if it is dead."""
        for folder in self.folders(name):
            _put(folder / "cgroup.procs", str(pid))

    def adopt(self, pid: int) -> None:
        """What the process takes from now on counts for all groups together: in v1 its memory,
        in v2 all."""
        folder = self._roots["memory"] / _LAUNCHERS
        folder.mkdir(exist_ok=True)
        _put(folder / "cgroup.procs", str(pid))

    def usage(self, name: str) -> GroupUsage:
        return self._version.usage(lambda controller, file: self.read(name, controller, file))

    def read(self, name: str, controller: Controller, file: str) -> str:
        return (self.folder(name, controller) / file).read_text()

    def remove(self, name: str) -> bool:
        """False if it cannot be yet: a process in it is still dying."""
        removed = [_remove(folder) for folder in self.folders(name)]  # each is tried
        return all(removed)

    def close(self) -> None:
        """Removes it all; what still has processes in it stays, for `remove_stale`."""
        for root in _distinct(self._roots.values()):
            _remove_with_groups(root)
        for lock in self._locks:
            os.close(lock)
        self._locks.clear()
        if self._left:  # in the root, groups of others may be controlled meanwhile
            above = self._above["memory"]
            with contextlib.suppress(OSError):  # somebody else has such groups there
                _put(above / "cgroup.subtree_control", "-memory -pids -cpu")
                _put(above / "cgroup.procs", "0")
        for folder in self._ours:
            _remove(folder)

    def _write(self, settings: list[Setting], folders: dict[Controller, Path]) -> None:
        for setting in settings:
            with contextlib.suppress(*[OSError] * setting.optional):
                _put(folders[setting.controller] / setting.file, setting.value)


def remove_stale(places: Places) -> None:
    """Removes what dead hosts left, in our own group or in those beside it (a login or a service
    has another each time). Groups with processes in them stay."""
    for above in _distinct(places.folders.values()):
        found: set[Path] = set()
        with contextlib.suppress(OSError):  # one of them goes away as we look
            found |= {*above.glob(f"{_PREFIX}*"), *above.parent.glob(f"*/{_PREFIX}*")}
        for old in found:
            if "." in old.name:
                _remove(old)  # a server's own: fails as long as that lives
            elif (lock := _try_lock(old)) is not None:
                _remove_with_groups(old)
                os.close(lock)


def _put(file: Path, value: str) -> None:
    """Much cheaper than `write_text`, and there are many for each launch."""
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _distinct(folders: Iterable[Path]) -> list[Path]:
    """In v2 all controllers share one."""
    return list(dict.fromkeys(folders))


def _enable(folder: Path) -> None:
    """v2: the groups in it are controlled. OSError (ENOENT) if it was not given the controllers."""
    _put(folder / "cgroup.subtree_control", "+memory +pids +cpu")


def _claim(folder: Path) -> int:
    """Makes it; the lock that is ours until we die. OSError if it cannot be had."""
    for _ in range(_CLAIMS):
        folder.mkdir(exist_ok=True)
        lock = _try_lock(folder)
        if lock is not None and folder.exists():
            return lock
        if lock is not None:  # another host took the new folder for a dead one's
            os.close(lock)
    raise OSError(errno.EBUSY, f"another process keeps a lock on {folder}")


def _try_lock(folder: Path) -> int | None:
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _remove(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        pass
    except OSError:
        return False
    return True


def _remove_with_groups(root: Path) -> None:
    with contextlib.suppress(OSError):
        for folder in root.iterdir():
            if folder.is_dir():
                _remove(folder)
    _remove(root)


def _three_quarters(places: Places) -> int:
    """Of the machine's memory, or of the least that our group and those above it may have."""
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    folder = places.folders["memory"]
    while True:
        for file in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
                most = min(most, int((folder / file).read_text()))
        if folder == folder.parent:
            return most * 3 // 4
        folder = folder.parent
