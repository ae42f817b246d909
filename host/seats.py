"""One launched inferlet's life: descriptors, start, death, accounts.

A seat goes starting -> running -> ending -> done. It is done when its process is dead and the
controller has freed what it held; only then does the client hear the end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Final, Protocol

import msgspec
from inferlet.abi import ABI_VERSION, ModelInfo, Startup

from piehost.host.shm import sealed_memfd
from piehost.wire import control, launch
from piehost.wire.client import (
    EXIT_HOST,
    EXIT_NOT_FOUND,
    EXIT_REFUSED,
    Ended,
    Failed,
    HostToClient,
    InferletInfo,
    Reason,
    Usage,
)

from .allotment import Quota
from .output import Output
from .programs import Program
from .rings import Ring

ENVIRONMENT: Final = {
    "PIEHOST_ABI": str(ABI_VERSION),
    "LANG": "C.UTF-8",
    "PATH": "/usr/bin:/bin",
    "HOME": "/",
}
_ENOENT: Final = 2


class SeatListener(Protocol):
    """What a seat tells its host."""

    def seat_output(self, seat: Seat, stream: int, data: bytes) -> None: ...

    def seat_dead(self, seat: Seat) -> None:
        """Its process is gone, or never was: what it held can be freed."""

    def seat_done(self, seat: Seat) -> None:
        """The last call: `seat.result()` is final."""


class Seat:
    """`number` is unique for ever and is its ring's number too; `generation` counts the cores
    the host has had, since a seat lives and dies with one."""

    def __init__(
        self,
        listener: SeatListener,
        ring: Ring,
        program: Program,
        quota: Quota,
        client_pid: int,
        request: int,
        generation: int,
    ) -> None:
        self.number = ring.number
        self.id = f"{program.name}-{ring.number}"
        self.program = program
        self.quota = quota
        self.client_pid = client_pid
        self.request = request
        self.generation = generation
        self.pid = 0  # until it is spawned
        self.untaken = 0  # the weight of its client's messages that it has not received
        self.held: list[HostToClient] = []  # for the client, once it is spawned
        self.state = "starting"
        self.stats = control.SeatStats()
        self._listener = listener
        self._ring_fd = ring.fd
        self._outputs: list[Output] = []
        self.pidfd = -1
        self._began = time.monotonic()
        self._status: int | None = None  # waitpid's
        self._spawn_failed: launch.SpawnFailed | None = None
        self._usage: Usage | None = None
        self._reason: Reason | None = None  # why it was ended, if it did not end by itself
        self._released = False
        self.admitted = False  # the controller knows of it

    # --- start ---------------------------------------------------------------------------------

    def start(
        self,
        args: list[str],
        waived: list[str],
        model: ModelInfo,
        vocabulary: int,
        admit: Callable[[control.Admit, list[int]], None],
        spawn: Callable[[launch.Spawn, list[int]], None],
    ) -> None:
        """Tells the controller and the launcher of it. OSError if descriptors are used up."""
        startup = Startup(
            abi=ABI_VERSION, id=self.id, args=args, models=[model], limits=self.quota.limits
        )
        with contextlib.ExitStack() as ours:

            def own(fd: int) -> int:
                ours.callback(os.close, fd)
                return fd

            ring = own(self._ring_fd)
            stdin = own(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
            controller_end, inferlet_end = map(ours.enter_context, socket.socketpair())
            block = own(sealed_memfd("piehost-startup", msgspec.msgpack.encode(startup)))
            # opened anew: read-only, and with an offset that no other inferlet moves
            vocab = own(os.open(f"/proc/self/fd/{vocabulary}", os.O_RDONLY | os.O_CLOEXEC))
            writers = [own(self._open_output(stream)) for stream in (1, 2)]
            limits = self.quota.limits
            admit(
                control.Admit(seat=self.number, id=self.id, limits=limits),
                [controller_end.fileno()],
            )
            self.admitted = True
            spawn(
                launch.Spawn(
                    seat=self.number,
                    kind=self.program.kind,
                    path=self.program.path,
                    argv=[self.program.path, *args] if self.program.kind == "native" else [],
                    env=ENVIRONMENT,
                    cwd=self.program.cwd,
                    profile=self.program.kind,
                    readable=self.program.readable,
                    limits=self.quota.rlimits,
                    waived=waived,
                ),
                [stdin, *writers, inferlet_end.fileno(), ring, block, vocab],
            )

    def _open_output(self, stream: int) -> int:
        reader, writer = os.pipe()
        name = "stdout" if stream == 1 else "stderr"
        self._outputs.append(
            Output(
                reader,
                name,
                self.quota.output_bytes,
                lambda data: self._listener.seat_output(self, stream, data),
            )
        )
        return writer

    def spawned(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        if self.state == "starting":
            self.state = "running"
        else:
            self._kill()

    # --- death ---------------------------------------------------------------------------------

    def end(self, reason: Reason) -> None:
        """Kills it; the first reason counts. `done` follows."""
        if self._reason is None and self.state != "done" and self._status is None:
            self._reason = reason
        if self.state in ("starting", "running"):
            self.state = "ending"
            self._kill()

    def _kill(self) -> None:
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def spawn_failed(self, message: launch.SpawnFailed) -> None:
        self._spawn_failed = message
        self._dead()

    def exited(self, message: launch.Exited) -> None:
        self._usage = Usage(
            user_seconds=message.user_seconds,
            system_seconds=message.system_seconds,
            max_rss_bytes=message.max_rss_bytes,
        )
        self._status = message.status
        if self._reason is None:
            self._reason = _reason_of(message, self.quota)
        else:  # ended for cause, even if it saw its connection end and exited before the signal
            self._status = signal.SIGKILL
        self._dead()

    def launcher_lost(self, reason: Reason) -> None:
        """Nobody will report its exit; the kernel kills it with its launcher, and so do we."""
        if self._status is None and self._spawn_failed is None:
            self.end(reason)
            self._status = signal.SIGKILL
            self._dead()

    def _dead(self) -> None:
        self.state = "ending"
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        for output in self._outputs:
            output.finish()
        self._listener.seat_dead(self)
        self._check_done()

    def released(self, stats: control.SeatStats | None) -> None:
        """The controller has freed what it held (`stats`), or is dead itself (nil)."""
        if stats is not None:
            self.stats = stats
        self._released = True
        self._check_done()

    def _check_done(self) -> None:
        dead = self._status is not None or self._spawn_failed is not None
        if dead and self._released and self.state != "done":
            self.state = "done"
            self._listener.seat_done(self)

    # --- accounts ------------------------------------------------------------------------------

    def result(self) -> Ended | Failed:
        """The last answer to the client, once the seat is done."""
        if self._spawn_failed is not None and self._reason is None:
            return _failed_spawn(self.request, self.program, self._spawn_failed)
        code = EXIT_HOST
        if self._status is not None and not _is_ours(self._reason):
            code = os.waitstatus_to_exitcode(self._status)
            code = code if code >= 0 else 128 - code
        return Ended(
            request=self.request,
            code=code,
            reason=self._reason,
            stats=self.stats,
            usage=self._usage,
        )

    def info(self, stats: control.SeatStats | None) -> InferletInfo:
        return InferletInfo(
            id=self.id,
            program=self.program.path,
            pid=self.pid,
            client_pid=self.client_pid,
            state=self.state,
            seconds=time.monotonic() - self._began,
            stats=stats or self.stats,
        )


def _is_ours(reason: Reason | None) -> bool:
    """piehost's own failure, rather than the inferlet's or somebody's wish."""
    return reason is not None and (reason.code.endswith("_lost") or reason.code == "host_ended")


def _reason_of(exited: launch.Exited, quota: Quota) -> Reason | None:
    """Why a process that nobody ended is dead; None if it returned an exit code."""
    if not os.WIFSIGNALED(exited.status):
        return None
    number = os.WTERMSIG(exited.status)
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if exited.violation is not None:
        return Reason(
            code="sandbox",
            what=f"killed by the sandbox: {exited.violation}",
            why="the inferlet made a system call that its profile forbids",
            hint="`piehost doctor` lists what the sandbox stops",
        )
    if number in (signal.SIGXCPU, signal.SIGKILL) and quota.rlimits.cpu_seconds is not None:
        return Reason(
            code="cpu_seconds",
            what="the inferlet used up its processor time",
            why=f"quota cpu_seconds is {quota.rlimits.cpu_seconds}",
            hint="--quota cpu_seconds=N with a larger N",
        )
    return Reason(
        code="signal",
        what=f"the inferlet was killed by {name}",
        why="it crashed" if number != signal.SIGKILL else "somebody killed it",
    )


def _failed_spawn(request: int, program: Program, failed: launch.SpawnFailed) -> Failed:
    missing = failed.stage == "exec" and failed.errno == _ENOENT
    return Failed(
        request=request,
        code=EXIT_NOT_FOUND if missing else EXIT_REFUSED,
        reason=Reason(
            code=f"spawn_{failed.stage}",
            what=f"cannot start {program.path}",
            why=f"{failed.stage}: {failed.message}",
            hint=failed.hint,
        ),
    )
