"""Programs of the C driver for tests: one whose controller the test plays, and one before the real
controller that has a prompt (`c_contexts.Stand`)."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator

import pytest

from .c_contexts import Stand, fill, ok
from .c_driver import C, Program, Tiny, make

needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc")

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """The library as programs use it, and the drivers."""
    make(C, "all", "drivers")


@pytest.fixture
def started() -> Iterator[Program]:
    """It waits for its first line."""
    with Program() as p:
        assert p.line() == "ok"
        yield p


@pytest.fixture
def prompted(stand: Stand) -> Iterator[Program]:
    """With a context that holds PROMPT."""
    with stand.program() as p:
        ok(p, "context 0")
        fill(p, PROMPT)
        yield p


def served(program: Program) -> tuple[Tiny, threading.Thread]:
    """The controller that carries out what a context needs, at work until the program ends."""
    tiny = Tiny(program)
    thread = threading.Thread(target=tiny.serve)
    thread.start()
    return tiny, thread
