"""Notices processes of ours that are stopped or hang, and ends them.

Their death is then as any other: the host hears of it, says why, and starts new ones. What counts
is what they do, not how long it takes: a long step on a busy machine must never look like a hang.
Time is counted in looks, so that a host which was itself stopped blames nobody for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, Final

from msgspec import Struct

from .children import Child
from .log import log
from .process_use import has_children, process_use

_STOPPED: Final = "T"  # by a signal; "t" is for a debugger
_SLEEPS: Final = "S"


class Patience(Struct, frozen=True):
    """Seconds, rounded up to whole looks."""

    look: float = 0.5  # from one look to the next
    ping: float = 5.0  # from an answer to the next ping
    stopped: float = 1.0  # by SIGSTOP
    idle: float = 30.0  # it owes an answer and does not run, nor waits for a disk or a compiler
    busy: float = 60.0  # of processor time since it was pinged; not of a backend's, which computes


class _Pulse(Struct, eq=False):
    """What the looks at one process have shown."""

    stopped: int = 0  # looks in a row
    answered: int = 0  # looks since its last answer
    idle: int = 0  # looks in a row, while it owes an answer
    cpu_seconds: float = 0.0  # at the last look
    pinged_at: float = 0.0  # processor seconds it had used by then


class Watchdog:
    """Looks at `processes()` for as long as the event loop runs and it is not closed."""

    def __init__(
        self, processes: Callable[[], Iterable[Child[Any]]], patience: Patience | None = None
    ) -> None:
        """`processes` are those that have not ended."""
        self._processes = processes
        self._patience = patience or Patience()
        self._pulses: dict[Child[Any], _Pulse] = {}
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_soon(self._look)

    def close(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        self._timer = self._loop.call_later(self._patience.look, self._look)
        self._pulses = {c: self._pulses.get(c) or _Pulse() for c in self._processes()}
        for child, pulse in self._pulses.items():
            fault = self._fault(child, pulse)
            if fault:
                log(f"the {child.name} process ({child.pid}) is ended: {fault}")
                child.end(fault)

    def _fault(self, child: Child[Any], pulse: _Pulse) -> str:
        """Why it is to be ended; empty if it is well."""
        use, patience = process_use(child.pid), self._patience
        pulse.stopped = pulse.stopped + 1 if use.state == _STOPPED else 0
        if (pulse.stopped - 1) * patience.look >= patience.stopped:
            return f"it was stopped (SIGSTOP) for more than {patience.stopped:g} s"
        ran, pulse.cpu_seconds = use.cpu_seconds > pulse.cpu_seconds, use.cpu_seconds
        if child.answered:
            pulse.idle = 0
            pulse.answered += 1
            if child.reads and (pulse.answered - 1) * patience.look >= patience.ping:
                pulse.answered, pulse.pinged_at = 0, use.cpu_seconds
                child.ping()
            return ""
        sleeps = use.state == _SLEEPS and not ran
        if sleeps and child.computes:  # a compiler may run for it: some kernels are built when used
            sleeps = not has_children(child.pid)
        pulse.idle = pulse.idle + 1 if sleeps else 0
        if pulse.idle * patience.look >= patience.idle:
            return f"it gave no answer and did nothing for {patience.idle:g} s"
        busy = use.cpu_seconds - pulse.pinged_at
        if not child.computes and busy >= patience.busy:
            return f"it gave no answer in {patience.busy:g} s of processor time"
        return ""
