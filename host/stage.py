"""Runs one program in the sandbox with our own ends of its descriptors: no controller, no model.

What it is started with is given, what it says is read from `sock`, what it is told is written
there. A stage serves one run. Made and used inside a running event loop.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import termios
from pathlib import Path
from typing import Final, Protocol

import msgspec
from inferlet.abi import Startup

from piehost.host.shm import (
    RingReader,
    RingWriter,
    create_ring,
    create_ring_in,
    seal_ring,
    sealed_memfd,
)
from piehost.wire import launch
from piehost.wire.client import EXIT_HOST, Failed, Reason

from . import endings
from .allotment import Quota
from .launchers import Launchers
from .output import Output
from .programs import Program
from .rings import RingSizes
from .seats import ENVIRONMENT

_NUMBER: Final = 1  # of its seat: the launchers want one


class StageListener(Protocol):
    def stage_output(self, stream: int, data: bytes) -> None:
        """The program wrote to its stdout (1) or stderr (2)."""

    def stage_exited(self, code: int, reason: Reason | None) -> None:
        """It is dead, by itself or by `kill`; 128 + n is signal n."""

    def stage_failed(self, failed: Failed) -> None:
        """It did not start."""


class Stage:
    def __init__(
        self,
        program: Program,
        startup: Startup,
        vocabulary: bytes,
        sizes: RingSizes,
        quota: Quota,
        waived: list[str],
        listener: StageListener,
    ) -> None:
        """Starts it. OSError or ValueError if its descriptors cannot be made."""
        self._program = program
        self._quota = quota
        self._listener = listener
        self._pid = 0  # until it runs
        self._pidfd = -1
        self._killed = False
        self._outputs: list[Output] = []
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as on_error:

            def give(fd: int) -> int:
                theirs.callback(os.close, fd)
                return fd

            out = give(create_ring("piehost-ring-out", sizes.out))
            self.ring_out = RingWriter(out, sizes.out)
            on_error.callback(self.ring_out.close)
            seal_ring(out)
            into = give(create_ring_in("piehost-ring-in", sizes.into))
            self.ring_in = RingReader(into, sizes.into)
            on_error.callback(self.ring_in.close)
            stdin = give(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            block = give(sealed_memfd("piehost-startup", msgspec.msgpack.encode(startup)))
            table = give(sealed_memfd("piehost-vocabulary", vocabulary))
            # opened anew: read-only, or some kernels refuse to map it shared
            vocab = give(os.open(f"/proc/self/fd/{table}", os.O_RDONLY | os.O_CLOEXEC))
            self.sock, inferlet_end = socket.socketpair()
            theirs.enter_context(inferlet_end)
            on_error.enter_context(self.sock)
            writers = [give(self._open_output(stream)) for stream in (1, 2)]
            self._launchers = Launchers(self)
            self._launchers.spawn(
                launch.Spawn(
                    seat=_NUMBER,
                    kind=program.kind,
                    path=program.path,
                    argv=[program.path, *startup.args] if program.kind == "native" else [],
                    env=ENVIRONMENT,
                    cwd=program.cwd,
                    profile=program.profile,
                    readable=program.readable,
                    limits=quota.rlimits,
                    waived=waived,
                ),
                [stdin, *writers, inferlet_end.fileno(), out, into, block, vocab],
            )
            on_error.pop_all()

    def _open_output(self, stream: int) -> int:
        reader, writer = os.pipe()
        name = "stdout" if stream == 1 else "stderr"
        cap = self._quota.output_bytes
        output = Output(reader, name, cap, lambda data: self._listener.stage_output(stream, data))
        self._outputs.append(output)
        return writer

    def kill(self) -> None:
        """Ends the program; `stage_exited` follows."""
        self._killed = True
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def sleeps(self) -> bool:
        """Whether it has read all it was told, and none of its threads runs."""
        octets = fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4))
        if any(octets) or not self._pid:
            return False
        try:
            stats = [
                (task / "stat").read_bytes() for task in Path(f"/proc/{self._pid}/task").iterdir()
            ]
        except OSError:  # one has just ended
            return False
        return all(stat.rpartition(b")")[2].split()[0] == b"S" for stat in stats)  # proc(5)

    def close(self) -> None:
        """Ends all processes; returns when those that start programs are gone."""
        self.kill()
        for output in self._outputs:
            output.close()
        self._launchers.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self.sock.close()
        self.ring_out.close()
        self.ring_in.close()

    # --- launchers -----------------------------------------------------------------------------

    def from_launcher(self, message: launch.LauncherToHost, fds: list[int]) -> None:
        match message:
            case launch.Spawned():
                self._pid, (self._pidfd,) = message.pid, fds
                if self._killed:
                    self.kill()
            case launch.SpawnFailed():
                self._listener.stage_failed(endings.failed_spawn(0, self._program, message))
            case launch.Exited():
                for output in self._outputs:
                    output.finish()
                code = os.waitstatus_to_exitcode(message.status)
                reason = endings.reason_of(message, self._quota)
                self._listener.stage_exited(code if code >= 0 else 128 - code, reason)

    def launcher_lost(self, kind: str, reason: Reason) -> None:
        if kind == self._program.kind:
            self._listener.stage_failed(Failed(0, EXIT_HOST, reason))

    def launcher_failed(self, kind: str, reason: Reason) -> None:
        self.launcher_lost(kind, reason)
