"""Who an inferlet is: a user id of its own, or a user namespace of its own.

A host that may change user ids (root, mostly) gives each inferlet one from a pool, and no groups.
Any other host gives each its own user namespace, in which its user has no name. Either way the
number of its processes and threads is counted for it alone, and it can neither trace its siblings
nor read their memory. Which of the two it is, is found out by trying.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import stat
import struct
from pathlib import Path
from typing import Final

from .calls import Calls

CLONE_NEWUSER: Final = 0x10000000
# linux/capability.h, as bits
DAC_OVERRIDE: Final = 1 << 1
DAC_READ_SEARCH: Final = 1 << 2

# Ids that no distribution gives to people, services or containers (systemd's "Users, Groups, UIDs
# and GIDs": 65536 to 524287 are unused; /etc/subuid begins at 100000); and, in a container whose
# user namespace has no ids beyond 65535, those for services that have no fixed one.
POOLS: Final = (range(69632, 73728), range(61184, 65520))

_PR_SET_KEEPCAPS: Final = 8
_LOCK_FOLDERS: Final = ("/run", "/dev/shm", "/tmp")
_LOCK_FILE: Final = "piehost-uids.lock"
_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid


class Uids:
    """A pool of user ids that all hosts on the machine draw from.

    An id in use is a locked octet of a file, at the id's offset, so the kernel gives it back with
    its launcher; and none is handed out that a process still has.
    """

    def __init__(self, pool: range) -> None:
        """OSError if there is nowhere to keep the locks."""
        self._pool = pool
        self._locks = _lock_file()
        self._next = random.randrange(len(pool))
        self._taken: set[int] = set()  # one's own locks do not exclude oneself

    def claim(self) -> int:
        """An id that nothing and nobody has. OSError EAGAIN if all are taken."""
        for _ in self._pool:
            uid = self._pool[self._next]
            self._next = (self._next + 1) % len(self._pool)
            if uid in self._taken or not self._lock(uid, fcntl.F_WRLCK):
                continue
            if _is_free(uid):
                self._taken.add(uid)
                return uid
            self._lock(uid, fcntl.F_UNLCK)
        raise OSError(errno.EAGAIN, f"all {len(self._pool)} user ids for inferlets are taken")

    def release(self, uid: int) -> None:
        self._taken.remove(uid)
        self._lock(uid, fcntl.F_UNLCK)

    def _lock(self, uid: int, kind: int) -> bool:
        try:
            fcntl.fcntl(self._locks, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, uid, 1, 0))
        except (BlockingIOError, PermissionError):
            return False
        return True


class Identity:
    """What this launcher can give: `uids`, or else `has_namespace`, or else `errno` says why not.

    `around`: a user namespace that every inferlet is put into first, if there is one.
    """

    def __init__(self, around: int | None) -> None:
        self.errno = 0
        self.uids: Uids | None = None
        self.has_namespace = False
        # of the capabilities to read what is closed, those that this launcher could pass on
        self.readers = DAC_OVERRIDE | DAC_READ_SEARCH
        if around is None:
            self.readers &= _capabilities()
        for pool in POOLS if os.geteuid() == 0 else ():
            try:
                for uid in (pool[0], pool[-1]):
                    _try_uid(uid, around)
                self.uids = Uids(pool)
                return
            except OSError as error:
                self.errno = error.errno or errno.EPERM
        try:
            calls = Calls()
            enter_user_namespace(calls, around)
            become_nobody(calls)
            calls.try_in_new_process()
            self.has_namespace = True
        except OSError as error:
            self.errno = self.errno or error.errno or errno.EPERM

    @property
    def available(self) -> bool:
        return self.uids is not None or self.has_namespace


def enter_user_namespace(calls: Calls, namespace: int | None) -> None:
    """With all capabilities in it."""
    if namespace is not None:
        calls.add("user namespace", "setns", namespace, CLONE_NEWUSER)


def become(calls: Calls, uid: int, readers: int) -> None:
    """User and group `uid`, and no other group; capabilities that are not `readers` are lost."""
    if readers:
        calls.add("identity", "prctl", _PR_SET_KEEPCAPS, 1)
    calls.add("identity", "setgroups", 0, 0)
    calls.add("identity", "setresgid", uid, uid, uid)
    calls.add("identity", "setresuid", uid, uid, uid)


def become_nobody(calls: Calls) -> None:
    """A user namespace of its own. Nobody is given a name in it, since nobody needs one: the kernel
    goes by the user outside."""
    calls.add("identity", "unshare", CLONE_NEWUSER)


def closed_to_others(path: str, above: str, wanted: int) -> tuple[str, int] | None:
    """What keeps a user without rights of their own from using `path` in the way `wanted`
    (S_IROTH, S_IXOTH): it, or a folder on the way to it that lies in or at `above`; with it, what
    it lacks. None if nothing does."""
    at = path
    while True:
        mode = Path(at).stat().st_mode
        if stat.S_ISDIR(mode):
            wanted |= stat.S_IXOTH
        if mode & wanted != wanted:
            return at, wanted
        if at in (above, "/"):
            return None
        at, wanted = str(Path(at).parent), 0


def _try_uid(uid: int, around: int | None) -> None:
    """OSError if a child cannot become that user, or could not be ended any more."""
    calls = Calls()
    enter_user_namespace(calls, around)
    become(calls, uid, 0)
    calls.try_in_new_process(lambda pid: os.kill(pid, 0))


def _capabilities() -> int:
    """This process's effective ones."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("CapEff:")[1].split()[0], 16)


def _is_free(uid: int) -> bool:
    try:
        os.getpriority(os.PRIO_USER, uid)
    except ProcessLookupError:
        return True
    return False


def _lock_file() -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    code = errno.ENOENT
    for folder in _LOCK_FOLDERS:
        try:
            fd = os.open(f"{folder}/{_LOCK_FILE}", flags, 0o600)
        except OSError as error:
            code = error.errno or code
            continue
        if os.fstat(fd).st_uid == os.geteuid():
            return fd
        os.close(fd)
        code = errno.EPERM
    raise OSError(code, f"no lock file in {', '.join(_LOCK_FOLDERS)}: {os.strerror(code)}")
