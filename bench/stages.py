"""What each layer of the sandbox costs a launch of a static executable.

It is timed from within: `Clocked` is the launcher's own table of system calls with a look at the
clock before each stage.

    python -m bench.stages PROGRAM

prints the stages of each of many launches, as JSON.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final
from unittest import mock

import msgspec

from piehost.host.sandbox import child
from piehost.host.sandbox.calls import Calls
from piehost.host.sandbox.child import RESERVED
from piehost.host.sandbox.start import Starter
from piehost.wire.launch import Rlimits, Spawn

_LAUNCHES: Final = 1000


class Clocked(Calls):
    """Looks at the clock (ns) before each stage, in a child that shares this memory."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []
        self._times: list[Any] = []

    def add(self, stage: str, name: str, *arguments: int, **rest: Any) -> None:
        if not self.stages or self.stages[-1] != stage:
            self.stages.append(stage)
            self._times.append((ctypes.c_int64 * 2)())
            address = ctypes.addressof(self._times[-1])
            super().add("clock", "clock_gettime", time.CLOCK_MONOTONIC, address)
        super().add(stage, name, *arguments, **rest)

    def seconds(self) -> dict[str, float]:
        """Of each stage; the last one has no end. The looks at the clock are in it."""
        at = [whole + part * 1e-9 for whole, part in self._times]
        taken: dict[str, float] = {}
        for stage, start, end in zip(self.stages, at, at[1:], strict=False):
            taken[stage] = taken.get(stage, 0.0) + end - start
        return taken


def launch_stages(program: Path) -> dict[str, dict[str, float]]:
    """Of `_LAUNCHES` launches of a static executable: seconds of each stage (p50 and p99)."""
    done = subprocess.run(  # of its own: a launcher has one thread, and a filter above it
        [sys.executable, "-m", "bench.stages", program], stdout=subprocess.PIPE, check=True
    )
    samples = msgspec.json.decode(done.stdout, type=list[dict[str, float]])
    stages = {}
    for stage in samples[0]:
        parts = statistics.quantiles([sample[stage] for sample in samples], n=100)
        stages[stage] = {"p50": parts[49], "p99": parts[98]}
    return stages


def main() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3, RESERVED):  # as the launcher does: a child lays out its own there
        if fd != null:
            os.dup2(null, fd, inheritable=False)
    starter = Starter("native")
    spawn = Spawn(
        seat=1,
        kind="native",
        path=sys.argv[1],
        argv=sys.argv[1:],
        env={},
        cwd="/",
        profile="native",
        readable=sys.argv[1:],
        limits=Rlimits(address_space=1 << 30, open_files=64, file_size=1 << 20),
    )
    samples = []
    with mock.patch.object(child, "Calls", Clocked):
        for _ in range(_LAUNCHES):
            started = starter.start(spawn, [null] * len(child.TARGETS))
            os.waitpid(started.pid, 0)
            starter.release(started.uid)
            os.close(started.pidfd)
            os.close(started.status)
            assert isinstance(started.calls, Clocked)
            samples.append(started.calls.seconds())
    sys.stdout.buffer.write(msgspec.json.encode(samples))


if __name__ == "__main__":
    main()
