"""A long load's progress: on stderr, only on a terminal, gone when it is done."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from piehost.wire.client import Progress

if TYPE_CHECKING:
    from rich.status import Status


class LoadProgress:
    def __init__(self) -> None:
        self._status: Status | None = None

    def show(self, progress: Progress) -> None:
        if not sys.stderr.isatty():
            return
        text = f"{progress.stage} {progress.fraction:.0%}"
        if self._status is None:
            from rich.console import Console

            self._status = Console(stderr=True).status(text)
            self._status.start()
        else:
            self._status.update(text)

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
