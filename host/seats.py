"""One launched inferlet's life: descriptors, start, death, accounts.

A seat goes starting -> running -> ending -> done. It is done when its process is dead, the
controller has freed what it held, and its children are done; only then does its owner hear the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
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
    Ended,
    Failed,
    InferletInfo,
    Reason,
    Usage,
)
from piehost.wire.recording import RECORDING_VERSION, Head

from . import endings
from .allotment import Quota
from .conform.weather import Weather
from .errors import HostError
from .family import Family
from .output import Output
from .programs import Program
from .recording import Recorder
from .rings import Rings
from .tap import Tap

ENVIRONMENT: Final = {
    "PIEHOST_ABI": str(ABI_VERSION),
    "LANG": "C.UTF-8",
    "PATH": "/usr/bin:/bin",
    "HOME": "/",
}


def _version() -> str:
    try:
        return importlib.metadata.version("piehost")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "0+checkout"


VERSION: Final = _version()


class SeatListener(Protocol):
    """What a seat tells its host."""

    def seat_dead(self, seat: Seat) -> None:
        """Its process is gone, or never was: what it held can be freed."""

    def seat_done(self, seat: Seat) -> None:
        """The last call: `seat.result()` is final."""


class Owner(Protocol):
    """Who an inferlet runs for. Told `refused`, or `admitted`, perhaps `started`, and `done`."""

    child: int  # the number of the `Spawn` that it was started for, if a parent did

    @property
    def parent(self) -> Seat | None: ...

    @property
    def seat(self) -> Seat | None:
        """None until it is admitted."""

    @property
    def client_pid(self) -> int: ...

    @property
    def recorder(self) -> Recorder | None:
        """What its run is recorded with."""

    @property
    def weather(self) -> Weather | None:
        """How the connection of a recorded run behaves; None: as ever."""

    def refused(self, error: HostError) -> None:
        """It was never admitted, and will not be."""

    def admitted(self, seat: Seat) -> None:
        """The controller knows of it."""

    def started(self, seat: Seat) -> None:
        """Its process runs."""

    def output(self, stream: int, data: bytes) -> None: ...

    def done(self, seat: Seat) -> None:
        """`seat.result()` is final."""


class Seat:
    """`number` is unique for ever and is its ring's number too; `generation` counts the cores
    the host has had, since a seat lives and dies with one."""

    def __init__(
        self,
        listener: SeatListener,
        rings: Rings,
        program: Program,
        quota: Quota,
        family: Family,
        owner: Owner,
        generation: int,
    ) -> None:
        self.number = rings.number
        self.id = f"{program.name}-{rings.number}"
        self.program = program
        self.quota = quota
        self.family = family
        self.owner = owner
        self.generation = generation
        self.children: set[Owner] = set()
        self.pid = 0  # until it is spawned
        self.state = "starting"
        self.stats = control.SeatStats()
        self._listener = listener
        self._rings = rings
        self._outputs: list[Output] = []
        self._tap: Tap | None = None  # if its run is recorded
        self._heard_out = False  # it is dead, and the controller has all that it wrote
        self.pidfd = -1
        self._began = time.monotonic()
        self._alarm: asyncio.TimerHandle | None = None
        self._status: int | None = None  # waitpid's
        self._spawn_failed: launch.SpawnFailed | None = None
        self._usage: Usage | None = None
        self._reason: Reason | None = None  # why it was ended, if it did not end by itself
        self.freed = False  # the controller holds nothing of it any more
        self.admitted = False  # the controller knows of it

    # --- start ---------------------------------------------------------------------------------

    def start(
        self,
        args: list[str],
        model: ModelInfo,
        vocabulary: int,
        admit: Callable[[control.Admit, list[int]], None],
        spawn: Callable[[launch.Spawn, list[int]], None],
    ) -> None:
        """Tells the controller and the launcher of it. OSError if descriptors are used up."""
        family, limits, parent = self.family, self.quota.limits, self.owner.parent
        if parent is None:
            family.job = family.job or self.id
            self._set_deadline()
        startup = Startup(
            abi=ABI_VERSION,
            version=VERSION,
            id=self.id,
            user=family.user,
            job=family.job,
            deadline=family.deadline,
            args=args,
            models=[model],
            limits=limits,
        )
        recorder, weather = self.owner.recorder, self.owner.weather
        shown = weather.startup(startup) if weather else msgspec.msgpack.encode(startup)
        with contextlib.ExitStack() as ours:

            def own(fd: int) -> int:
                ours.callback(os.close, fd)
                return fd

            rings = [own(self._rings.out), own(self._rings.into)]
            stdin = own(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
            if recorder is not None:
                self._tap = Tap(recorder, startup, self._rings, weather)
                ends = self._tap.controller_end, self._tap.inferlet_end
            else:
                ends = socket.socketpair()
            controller_end, inferlet_end = map(ours.enter_context, ends)
            block = own(sealed_memfd("piehost-startup", shown))
            # opened anew: read-only, and with an offset that no other inferlet moves
            vocab = own(os.open(f"/proc/self/fd/{vocabulary}", os.O_RDONLY | os.O_CLOEXEC))
            writers = [own(self._open_output(stream)) for stream in (1, 2)]
            if recorder is not None:
                recorder.begin(self._head(startup, vocab), self.condemn)
            admit(
                control.Admit(
                    seat=self.number,
                    id=self.id,
                    limits=limits,
                    user=family.user,
                    job=family.job,
                    parent=parent.number if parent is not None else 0,
                    child=self.owner.child,
                ),
                [controller_end.fileno()],
            )
            self.admitted = True
            self.owner.admitted(self)
            spawn(
                launch.Spawn(
                    seat=self.number,
                    kind=self.program.kind,
                    path=self.program.path,
                    argv=[self.program.path, *args] if self.program.kind == "native" else [],
                    env=ENVIRONMENT,
                    cwd=self.program.cwd,
                    profile=self.program.profile,
                    readable=self.program.readable,
                    limits=self.quota.rlimits,
                    waived=family.waived,
                ),
                [stdin, *writers, inferlet_end.fileno(), *rings, block, vocab],
            )

    def _head(self, startup: Startup, vocabulary: int) -> Head:
        return Head(
            version=RECORDING_VERSION,
            program=self.program.name,
            kind=self.program.profile,
            startup=startup,
            vocabulary=os.pread(vocabulary, os.fstat(vocabulary).st_size, 0),
            ring_bytes=self._rings.sizes.out,
            ring_in_bytes=self._rings.sizes.into,
            began=time.time(),
        )

    def _set_deadline(self) -> None:
        """From here on; the descendants have no later one, since they end with this one."""
        seconds = self.quota.wall_seconds
        if seconds is None:
            return
        self.family.deadline = time.time() + seconds
        reason = Reason(
            code="wall_seconds",
            what="the inferlet ran out of time",
            why=f"quota wall_seconds is {seconds}",
            hint="--quota wall_seconds=N with a larger N",
        )
        self._alarm = asyncio.get_running_loop().call_later(seconds, self.end, reason)

    def _open_output(self, stream: int) -> int:
        reader, writer = os.pipe()
        name = "stdout" if stream == 1 else "stderr"
        self._outputs.append(
            Output(
                reader,
                name,
                self.quota.output_bytes,
                lambda data: self._written(stream, data),
            )
        )
        return writer

    def _written(self, stream: int, data: bytes) -> None:
        if self._tap is not None:
            self._tap.written(stream, data)
        self.owner.output(stream, data)

    def spawned(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        if self.state == "starting":
            self.state = "running"
        else:
            self._kill()
        self.owner.started(self)

    # --- death ---------------------------------------------------------------------------------

    def end(self, reason: Reason) -> None:
        """Kills it; the first reason counts. `done` follows."""
        if self._reason is None and self.state != "done" and self._status is None:
            self._reason = reason
        if self.state in ("starting", "running"):
            self.state = "ending"
            self._kill()

    def condemn(self, reason: Reason) -> None:
        """`end` for what it did: that counts even if it has exited by itself meanwhile."""
        if self._status is not None and self._reason is None and self.state != "done":
            self._reason, self._status = reason, signal.SIGKILL
        self.end(reason)

    @property
    def dead(self) -> bool:
        """It has no process, and will not have one."""
        return self._status is not None or self._spawn_failed is not None

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
            self._reason = endings.reason_of(message, self.quota)
        else:  # ended for cause, even if it saw its connection end and exited before the signal
            self._status = signal.SIGKILL
        self._dead()

    def launcher_lost(self, reason: Reason) -> None:
        """Nobody will report its exit; the kernel kills it with its launcher, and so do we."""
        if not self.dead:
            self.end(reason)
            self._status = signal.SIGKILL
            self._dead()

    def _dead(self) -> None:
        self.state = "ending"
        if self._alarm is not None:
            self._alarm.cancel()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        for output in self._outputs:
            output.finish()
        if self._tap is not None:
            self._tap.finish(self._is_heard_out, wait=not self.freed)
        else:
            self._is_heard_out()

    def _is_heard_out(self) -> None:
        self._heard_out = True
        if self.owner.recorder is not None and self._status is not None:
            self.owner.recorder.flush()
        self._listener.seat_dead(self)
        self._check_done()

    def released(self, stats: control.SeatStats | None) -> None:
        """The controller has freed what it held (`stats`), or is dead itself (nil)."""
        if stats is not None:
            self.stats = stats
        self.freed = True
        self._check_done()

    def child_left(self) -> None:
        """One of `children` is no more."""
        self._check_done()

    def _check_done(self) -> None:
        if self._heard_out and self.freed and not self.children and self.state != "done":
            self.state = "done"
            self._listener.seat_done(self)

    # --- accounts ------------------------------------------------------------------------------

    def result(self, request: int) -> Ended | Failed:
        """The last answer to the client's `request`, once the seat is done."""
        if self._spawn_failed is not None and self._reason is None:
            return endings.failed_spawn(request, self.program, self._spawn_failed)
        code = EXIT_HOST
        if self._status is not None and not endings.is_ours(self._reason):
            code = os.waitstatus_to_exitcode(self._status)
            code = code if code >= 0 else 128 - code
        return Ended(
            request=request,
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
            client_pid=self.owner.client_pid,
            state=self.state,
            seconds=time.monotonic() - self._began,
            stats=stats or self.stats,
            user=self.family.user,
            job=self.family.job,
            parent=self.owner.parent.id if self.owner.parent is not None else "",
        )
