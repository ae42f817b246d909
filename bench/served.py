"""A real server and the bench's own inferlets on it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from piehost.host.client import Client, Run, connect
from piehost.wire import client as wire

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "bench" / "programs"
# before a command: it sees no control groups
HIDE_CGROUPS: Final = (
    *("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /sys/fs/cgroup && exec "$@"', "sh"),
)


@contextlib.contextmanager
def server(*options: str, under: tuple[str, ...] = ()) -> Iterator[Client]:
    """A `piehost serve` of the embedded model with these options, and a client of it. `under`: a
    command that it is run by."""
    with tempfile.TemporaryDirectory(prefix="piehost-bench-") as directory:
        environment = {**os.environ, "XDG_RUNTIME_DIR": directory}
        process = subprocess.Popen(
            [
                *(*under, sys.executable, "-m", "piehost.host.cli"),
                *("serve", "--kv-pages", "4096", *options),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("piehost: serving"):
                raise SystemExit(f"the server did not start: {line}")
            with connect(str(Path(directory) / "piehost" / "host.sock")) as client:
                yield client
        finally:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def programs() -> Iterator[dict[str, dict[str, Path]]]:
    """name -> {"python": script, "c": static binary}, the binaries built for the occasion."""
    with tempfile.TemporaryDirectory(prefix="piehost-bench-") as directory:
        built: dict[str, dict[str, Path]] = {}
        for source in sorted(PROGRAMS.glob("*.c")):
            binary = Path(directory) / source.stem
            binding = ROOT / "bindings" / "c"
            subprocess.run(
                [
                    *("cc", "-std=c11", "-D_POSIX_C_SOURCE=200809L", "-O2", "-static"),
                    *("-I", binding, "-o", binary, source, binding / "inferlet.c"),
                ],
                check=True,
            )
            built[source.stem] = {"python": source.with_suffix(".py"), "c": binary}
        yield built


def messages(run: Run, count: int) -> list[bytes]:
    """The next `count` messages of a run. SystemExit if it ends before."""
    got: list[bytes] = []
    for event in run.events():
        match event:
            case wire.Message():
                got.append(event.data)
                if len(got) == count:
                    return got
            case wire.Ended():
                raise SystemExit(f"a bench inferlet ended early: {event.code} {event.reason}")
    raise SystemExit("a bench inferlet ended early")
