"""The fork server: starts inferlets in their sandbox, and tells how they ended.

    python -m piehost.host.sandbox.launcher --fd N [--preload]

Without --preload it is small, for executables; with it (the zygote) it has imported what Python
inferlets use, and they inherit that. It is single-threaded, because a fork copies one thread only
and because a parent-death signal follows a thread. It ends when its link does, its children too.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import resource
import select
import signal
import sys
import traceback
from pathlib import Path
from typing import Final

from msgspec import Struct

from piehost.wire.launch import Exited, HostToLauncher, Spawn, Spawned, SpawnFailed
from piehost.wire.link import Link, LinkClosed

from .calls import Calls
from .child import RESERVED, read_report
from .failure import SpawnRefused, failed_stage, unforeseen
from .policy import syscall_name
from .preload import freeze, preload
from .start import Starter
from .watch import Watch

UNNAMED: Final = "a forbidden system call, or one of another architecture (int 0x80, x32)"

# A zygote's first environment lies in the memory of all its children, so the launcher starts itself
# anew with these variables only.
_KEPT_VARIABLES: Final = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH")
_ONE_THREAD: Final = dict.fromkeys(
    ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"
)


class Running(Struct):
    """A child of ours. `status` is the pipe that ends with its set-up; None once it has."""

    seat: int
    pid: int
    pidfd: int
    status: int | None
    calls: Calls | None
    path: str
    uid: int | None
    sees_all: bool
    failed: bool = False
    violation: str | None = None


class Launcher:
    """The loop: messages from the host, children that start, children that end."""

    def __init__(self, link: Link[Spawn], kind: str) -> None:
        self._link = link
        self._starter = Starter(kind)
        self._poll = select.epoll()
        self._poll.register(link.fileno(), select.EPOLLIN)
        self._watch: Watch | None = self._starter.watch
        if self._watch is not None:
            self._poll.register(self._watch.fileno(), select.EPOLLIN)
        self._by_fd: dict[int, Running] = {}  # by pidfd, and by status pipe
        self._by_pid: dict[int, Running] = {}

    def serve(self) -> None:
        """LinkClosed when the host is gone."""
        while True:
            ready = {fd for fd, _ in self._poll.poll()}
            if self._watch is not None and self._watch.fileno() in ready:
                self._from_watch(self._watch)
            for fd in ready & self._by_fd.keys():
                if fd in self._by_fd:  # a child's other descriptor may have taken it away
                    self._from_child(fd, self._by_fd[fd])
            if self._link.fileno() in ready:  # last: new children reuse the numbers of old ones
                self._from_host()

    def _from_host(self) -> None:
        self._link.flush()
        self._want_writable()
        for spawn, descriptors in self._link.receive():
            try:
                self._spawn(spawn, descriptors)
            except SpawnRefused as refused:
                self._refuse(spawn.seat, refused)
            except Exception as error:  # a fault of ours must not end the inferlets of others
                traceback.print_exc()
                self._refuse(spawn.seat, unforeseen(spawn.path, error))
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    def _spawn(self, spawn: Spawn, descriptors: list[int]) -> None:
        new = self._starter.start(spawn, descriptors)
        child = Running(
            spawn.seat, new.pid, new.pidfd, new.status, new.calls, spawn.path, new.uid, new.sees_all
        )
        self._by_pid[child.pid] = child
        for fd in (new.pidfd, new.status):
            self._by_fd[fd] = child
            self._poll.register(fd, select.EPOLLIN)

    def _from_child(self, fd: int, child: Running) -> None:
        if child.status is not None:  # also before an end: what comes first is told first
            self._set_up(child, child.status)
        if fd == child.pidfd:
            self._ended(child)

    def _set_up(self, child: Running, status: int) -> None:
        report = read_report(status, child.calls) if child.calls else None
        child.calls = None  # it holds the secret of the exec
        self._forget(status)
        child.status = None
        if report is None:
            self._send(Spawned(child.seat, child.pid, child.sees_all), [child.pidfd])
        else:
            child.failed = True
            self._refuse(child.seat, failed_stage(*report, child.path))

    def _ended(self, child: Running) -> None:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid == 0:
            return
        del self._by_pid[child.pid]
        self._starter.release(child.uid)
        self._forget(child.pidfd)
        if child.failed:
            return
        if os.WIFSIGNALED(status):
            if child.violation is not None:
                status = signal.SIGSYS  # as when the filter itself kills
            elif os.WTERMSIG(status) == signal.SIGSYS:
                child.violation = UNNAMED
        self._send(
            Exited(
                seat=child.seat,
                status=status,
                user_seconds=usage.ru_utime,
                system_seconds=usage.ru_stime,
                max_rss_bytes=usage.ru_maxrss << 10,
                violation=child.violation,
            )
        )

    def _forget(self, fd: int) -> None:
        """Closes a child's descriptor. Closing alone would leave it in the epoll set for as long
        as a newer child, forked but not set up yet, holds a copy: its next event would be taken
        for one of whoever has that number then."""
        self._poll.unregister(fd)
        del self._by_fd[fd]
        os.close(fd)

    def _from_watch(self, watch: Watch) -> None:
        caught = watch.receive()
        if caught is None:
            return
        pid, number = caught
        child = self._by_pid.get(pid)
        if child is not None:
            child.violation = child.violation or syscall_name(number)
            signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)

    def _refuse(self, seat: int, refused: SpawnRefused) -> None:
        self._send(SpawnFailed(seat, refused.stage, refused.code, refused.message, refused.hint))

    def _send(self, message: Spawned | SpawnFailed | Exited, fds: list[int] | None = None) -> None:
        self._link.send(message, fds)
        self._want_writable()

    def _want_writable(self) -> None:
        events = select.EPOLLIN | (select.EPOLLOUT if self._link.backlog else 0)
        self._poll.modify(self._link.fileno(), events)


def main() -> None:
    parser = argparse.ArgumentParser(prog="piehost.host.sandbox.launcher")
    parser.add_argument("--fd", type=int, required=True, help="the link to the host")
    parser.add_argument("--preload", action="store_true", help="import what Python inferlets use")
    options = parser.parse_args()
    _clean_environment()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # inferlets inherit it
    if not options.preload:  # a handler could run in a child that shares this memory
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    link: Link[Spawn] = Link.from_fd(_reserve_low_descriptors(options.fd), HostToLauncher)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sys.dont_write_bytecode = True  # inferlets can write nothing
    if not sys.flags.safe_path:
        del sys.path[0]  # the folder this was started in is not for inferlets
    if options.preload:
        preload()
    launcher = Launcher(link, "python" if options.preload else "native")
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        sys.exit(
            f"launcher: {threads} threads run in it, and a fork is only safe with one\n"
            "try: see which import starts them, and stop it by its environment variable"
        )
    freeze()
    with contextlib.suppress(LinkClosed):
        launcher.serve()
    os._exit(0)


def _clean_environment() -> None:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT_VARIABLES or name.startswith("PYTHON")
    } | _ONE_THREAD
    if os.environ != kept:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], kept)


def _reserve_low_descriptors(link: int) -> int:
    """Moves `link` up and fills 0 to 9, so that a child can lay out its own there blindly."""
    moved = fcntl.fcntl(link, fcntl.F_DUPFD_CLOEXEC, RESERVED)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in range(3, RESERVED):
        if fd != null:
            os.dup2(null, fd, inheritable=False)
    return moved


if __name__ == "__main__":
    main()
