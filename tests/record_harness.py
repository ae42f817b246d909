"""Runs that are recorded on the shared server, and replayed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .host_harness import Server, Terminal

COUNT = """
    import sys
    import time

    from inferlet import Model, flush, inferlet, send

    @inferlet
    def main(model: Model, count: int = 3, code: int = 0, clock: bool = False, nap: int = 0):
        for number in range(count):
            send(f"{len(model.tokenize('one ' * (number + 1)).result())};")
        if clock:
            send(str(time.time()))
        flush()
        time.sleep(nap)
        sys.exit(code)
"""


@pytest.fixture
def terminal(server: Server) -> Terminal:
    """One with a server to record on."""
    return server.terminal


def record(terminal: Terminal, path: Path, program: Path, *args: str, stdin: bytes = b"") -> bytes:
    """What the recorded run printed on stdout."""
    return terminal.run(
        "launch", "--record", path, program, "--", *args, stdin=stdin, check=0
    ).stdout


def replay(
    terminal: Terminal, path: Path, program: Path, *args: str, code: int = 0
) -> subprocess.CompletedProcess[bytes]:
    return terminal.run("replay", "--verbose", path, program, "--", *args, check=code)
