"""Where hosts put their sockets, how one finds a running server, and what dead hosts left behind.

A host holds a POSIX record lock on `SOCKET.lock` for as long as it lives. The kernel drops the lock
with the process, so "is a server running" is one F_GETLK, which also names its pid; nothing waits
for a timeout, and a socket whose lock is free is stale.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from .errors import HostError

_MAX_SOCKET_PATH = 100  # sun_path holds 108 octets, ZeroMQ's own suffixes aside
_FLOCK = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux: type, whence, start, len, pid
_EPHEMERAL = "ephemeral-"


def run_dir() -> Path:
    """The user's run directory, made if it is not there. HostError if it is not safely ours."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(base) / "piehost" if base else Path(f"/tmp/piehost-{os.getuid()}")
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        info = path.lstat()
    except OSError as error:
        raise HostError(
            f"cannot make the run directory {path}",
            error.strerror or str(error),
            "set XDG_RUNTIME_DIR to a directory of yours",
            "run_dir",
        ) from error
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise HostError(
            f"the run directory {path} is not safe to use",
            "it must be a directory that you own, with mode 0700",
            f"rm -r {path}, or set XDG_RUNTIME_DIR to another directory",
            "run_dir",
        )
    return path


def server_socket(override: str | None = None) -> Path:
    """Where `piehost serve` listens: --socket, else PIEHOST_SOCKET, else the run directory."""
    override = override or os.environ.get("PIEHOST_SOCKET")
    return _checked(Path(override).absolute() if override else run_dir() / "host.sock")


def _checked(path: Path) -> Path:
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        raise HostError(
            f"the socket path {path} is too long",
            f"a Unix socket's path has at most {_MAX_SOCKET_PATH} octets",
            "a shorter --socket or XDG_RUNTIME_DIR",
            "socket_path",
        )
    return path


def lock_owner(socket: Path) -> int | None:
    """The pid of the live host that listens at `socket`, or None. It does not take the lock."""
    try:
        fd = os.open(f"{socket}.lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    finally:
        os.close(fd)
    return None if kind == fcntl.F_UNLCK else pid


def _cannot_listen(socket: Path, why: str) -> HostError:
    hint = "choose a --socket in a directory that you may write"
    return HostError(f"cannot listen at {socket}", why, hint, "socket_path")


class Claim:
    """This process is the host at `socket`, until `release` or death. HostError if another is."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self._lock = Path(f"{socket}.lock")
        while not self._take():  # the last host removed its lock file as we opened it
            pass
        if socket.exists() and not socket.is_socket():
            self._lock.unlink()
            os.close(self._fd)
            raise _cannot_listen(socket, "something that is no socket is there")
        with contextlib.suppress(FileNotFoundError):
            socket.unlink()  # the lock was free, so its host is dead

    def _take(self) -> bool:
        try:
            self._fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _cannot_listen(self.socket, error.strerror or str(error)) from error
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise HostError(
                f"a server already listens at {self.socket}",
                f"it is process {lock_owner(self.socket)}",
                "use it, stop it, or give another --socket",
                "already_running",
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._fd), self._lock.stat()):
                return True
        os.close(self._fd)
        return False

    def release(self) -> None:
        """Removes the socket and the lock file."""
        for path in (self.socket, self._lock):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        os.close(self._fd)


@contextlib.contextmanager
def _tidy_lock(directory: Path) -> Iterator[None]:
    """Held while private folders are made, claimed or cleaned, so that none is half-made."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def remove_stale() -> None:
    """Removes the private folders of ephemeral hosts that were killed."""
    with _tidy_lock(run_dir()):
        _remove_stale()


def _remove_stale() -> None:
    for old in run_dir().glob(f"{_EPHEMERAL}*"):
        if lock_owner(old / "host.sock") is None:
            shutil.rmtree(old, ignore_errors=True)


def claim_ephemeral(name: str) -> Claim:
    """A private folder with a claimed socket in it."""
    with _tidy_lock(run_dir()):
        _remove_stale()
        socket = ephemeral_socket(name)
        socket.parent.mkdir(mode=0o700)
        return Claim(socket)


def ephemeral_socket(name: str) -> Path:
    """Where the ephemeral host called `name` listens."""
    return _checked(run_dir() / f"{_EPHEMERAL}{name}" / "host.sock")


def release_ephemeral(claim: Claim) -> None:
    with _tidy_lock(run_dir()):
        claim.release()
        shutil.rmtree(claim.socket.parent, ignore_errors=True)
