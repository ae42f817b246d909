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
from pathlib import Path
from typing import Final

import msgspec
from inferlet.abi import ABI_VERSION, ModelInfo, Startup

from piehost.host.shm import sealed_memfd
from piehost.wire import control, launch
from piehost.wire.client import (
    EXIT_HOST,
    Ended,
    Failed,
    Reason,
    Usage,
)
from piehost.wire.recording import RECORDING_VERSION, Head

from . import endings
from .allotment import Quota
from .cgroups import Fault, GroupLimits, Groups, GroupUsage, give_way
from .family import Family
from .output import Output
from .owner import Owner, SeatListener
from .process_use import ProcessUse, process_use
from .programs import Program
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
        groups: Groups | None,
    ) -> None:
        self.number = rings.number
        self.id = f"{program.name}-{rings.number}"
        self.program = program
        self.quota = quota
        self.family = family
        self.owner = owner
        self.generation = generation
        # what the operator changed, of it or of its parent before it was spawned
        self.live_quota: dict[str, int | None] = {}
        if owner.parent is not None:
            self.live_quota |= owner.parent.live_quota
        self.children: set[Owner] = set()
        self.pid = 0  # until it is spawned
        self.sees_all = False  # it has no mount namespace
        self.state = "starting"
        self.stats = control.SeatStats()
        self._listener = listener
        self._rings = rings
        self._outputs: list[Output] = []
        self._tap: Tap | None = None  # if its run is recorded
        self._heard_out = False  # it is dead, and the controller has all that it wrote
        self.pidfd = -1
        self.began = time.monotonic()
        self._alarm: asyncio.TimerHandle | None = None
        self._status: int | None = None  # waitpid's
        self._spawn_failed: launch.SpawnFailed | None = None
        self.usage: Usage | None = None
        self.reason: Reason | None = None  # why it was ended, if it did not end by itself
        self.freed = False  # the controller holds nothing of it any more
        self.admitted = False  # the controller knows of it
        self._group = groups.take(self._group_limits, self._fault) if groups else None

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
            self._set_deadline(self.quota.wall_seconds)
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
                    rates=self.quota.rates,
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

    def _set_deadline(self, seconds: int | None) -> None:
        """So long after the launch; the descendants have no later one, since they end with this
        one. None: there is no deadline any more."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = self.family.deadline = None
        if seconds is None:
            return
        left = self.began + seconds - time.monotonic()
        self.family.deadline = time.time() + left
        reason = Reason(
            code="wall_seconds",
            what="the inferlet ran out of time",
            why=f"quota wall_seconds is {seconds}",
            hint="--quota wall_seconds=N with a larger N",
        )
        self._alarm = asyncio.get_running_loop().call_later(max(0, left), self.end, reason)

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

    def spawned(self, pid: int, pidfd: int, sees_all: bool) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.sees_all = sees_all
        if self._group is not None:
            try:
                self._group.join(pid, pidfd)
            except OSError as error:
                self.end(endings.reason_of_no_group(error))
        else:
            give_way(pid)
        if self.state == "starting":
            self.state = "running"
        else:
            self._kill()
        self.owner.started(self)

    @property
    def _group_limits(self) -> GroupLimits:
        quota = self.quota
        return GroupLimits(memory=quota.memory, threads=quota.threads, cpu=quota.cpu)

    @property
    def in_group(self) -> bool:
        """It has a control group, which limits its memory, threads and processor time."""
        return self._group is not None

    @property
    def group_folders(self) -> list[Path]:
        return self._group.folders if self._group is not None else []

    @property
    def group_usage(self) -> GroupUsage | None:
        """As its control group counts; None without one, or before it runs."""
        return self._group.usage() if self._group is not None and self.pid else None

    def _fault(self, fault: Fault) -> None:
        self.end(endings.reason_of_fault(fault, self.quota))

    def change_quota(self, changes: dict[str, int | None]) -> None:
        """What the host itself enforces is so from now on; `live_quota.py` sees to the others."""
        self.live_quota |= changes
        self.quota = self.quota.changed(changes)
        for output in self._outputs:
            output.set_cap(self.quota.output_bytes)
        if self._group is not None:
            self._group.set(self._group_limits)
        if "wall_seconds" in changes:
            self._set_deadline(self.quota.wall_seconds)

    @property
    def written(self) -> int:
        """Octets, to stdout or to stderr: the larger of the two."""
        return max((output.taken for output in self._outputs), default=0)

    # --- death ---------------------------------------------------------------------------------

    def end(self, reason: Reason) -> None:
        """Kills it; the first reason counts. `done` follows."""
        if self.reason is None and self.state != "done" and self._status is None:
            self.reason = reason
        if self.state in ("starting", "running"):
            self.state = "ending"
            self._kill()

    def condemn(self, reason: Reason) -> None:
        """`end` for what it did: that counts even if it has exited by itself meanwhile."""
        if self._status is not None and self.reason is None and self.state != "done":
            self.reason, self._status = reason, signal.SIGKILL
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
        self.usage = Usage(
            user_seconds=message.user_seconds,
            system_seconds=message.system_seconds,
            max_rss_bytes=message.max_rss_bytes,
        )
        self._status = message.status
        if self.reason is None:
            group = self._group.usage() if self._group is not None else None
            self.reason = endings.reason_of(message, self.quota, group)
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
        if self._group is not None:
            self._group.end()
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

    @property
    def process_use(self) -> ProcessUse:
        """Nothing before it runs, nor once it is dead: its pid may be another's then."""
        return process_use(self.pid) if self.pidfd >= 0 else ProcessUse()

    def result(self, request: int) -> Ended | Failed:
        """The last answer to the client's `request`, once the seat is done."""
        if self._spawn_failed is not None and self.reason is None:
            return endings.failed_spawn(request, self.program, self._spawn_failed)
        code = EXIT_HOST
        if self._status is not None and not endings.is_ours(self.reason):
            code = os.waitstatus_to_exitcode(self._status)
            code = code if code >= 0 else 128 - code
        return Ended(
            request=request,
            code=code,
            reason=self.reason,
            stats=self.stats,
            usage=self.usage,
        )
