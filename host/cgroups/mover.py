"""The thread that makes, fills and removes groups, in the order it was asked.

Moving a process takes from 0.1 ms to 20 ms, since the kernel waits until all processors have passed
a quiet point: too long for the host's loop, and for a launch. Even beside a launch it would take
processor time from it, so it waits until that is over.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from .tree import Tree

_LATER_SECONDS: Final = 0.01  # by then most inferlets have sent their first message
_RETRY_SECONDS: Final = 0.05
_CLOSE_SECONDS: Final = 5.0

Job = Callable[[], None]  # raises nothing


class Mover:
    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._asked: queue.SimpleQueue[tuple[float, Job] | None] = queue.SimpleQueue()
        self._later: deque[tuple[float, Job]] = deque()  # by time; all were put off alike
        self._dying: set[str] = set()  # groups whose processes are not quite gone yet
        self._thread = threading.Thread(target=self._run, name="cgroups", daemon=True)
        self._thread.start()

    def do(self, job: Job) -> None:
        self._asked.put((0.0, job))

    def do_later(self, job: Job) -> None:
        """When a launch that begins now is over."""
        self._asked.put((time.monotonic() + _LATER_SECONDS, job))

    def remove(self, name: str) -> None:
        """As soon as it is empty. For jobs only."""
        if not self._tree.remove(name):
            self._dying.add(name)

    def close(self) -> None:
        """Returns when all is done, and every group removed whose processes are gone by then."""
        self._asked.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                asked = self._asked.get(timeout=self._seconds_to_wait())
            except queue.Empty:
                self._remove_dying()
            else:
                if asked is None:
                    break
                due, job = asked
                if due:
                    self._later.append(asked)
                else:
                    job()
            while self._later and self._later[0][0] <= time.monotonic():
                self._later.popleft()[1]()
        for _, job in self._later:
            job()
        end = time.monotonic() + _CLOSE_SECONDS
        while self._dying and time.monotonic() < end:
            time.sleep(_RETRY_SECONDS)
            self._remove_dying()

    def _seconds_to_wait(self) -> float | None:
        if self._later:
            return max(0.0, self._later[0][0] - time.monotonic())
        return _RETRY_SECONDS if self._dying else None

    def _remove_dying(self) -> None:
        self._dying -= {name for name in self._dying if self._tree.remove(name)}
