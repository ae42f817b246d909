"""Time that a request takes, less the time it waits for its inferlet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Stopwatch:
    """Calls `on_end` once when it has run for `seconds`. It stands still at first."""

    def __init__(self, seconds: float, on_end: Callable[[], None]) -> None:
        self._left = seconds
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._since = 0.0

    def run(self, running: bool) -> None:
        """Lets it run, or stand still; as it was already is fine."""
        if running and self._timer is None:
            self._since = self._loop.time()
            self._timer = self._loop.call_later(max(self._left, 0.0), self._on_end)
        elif not running and self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._left -= self._loop.time() - self._since
