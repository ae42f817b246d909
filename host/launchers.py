"""The two fork servers: one for executables, one (the zygote) for Python, imports done already."""

from __future__ import annotations

from typing import Final, Protocol

from piehost.wire import launch
from piehost.wire.client import Reason

from .children import Child

# process name and options, by kind of program
_KINDS: Final[dict[str, tuple[str, list[str]]]] = {
    "native": ("launcher", []),
    "python": ("zygote", ["--preload"]),
}
_MAX_FAILED_STARTS: Final = 3  # deaths in a row without one inferlet spawned


class LauncherListener(Protocol):
    """What the launchers tell their host."""

    def from_launcher(self, message: launch.LauncherToHost, fds: list[int]) -> None: ...

    def launcher_lost(self, kind: str, reason: Reason) -> None:
        """Its inferlets are dead or dying (they have a parent-death signal). A new one starts."""

    def launcher_failed(self, kind: str, reason: Reason) -> None:
        """It cannot be started."""


class Launchers:
    def __init__(self, listener: LauncherListener) -> None:
        self._listener = listener
        self._failed_starts = dict.fromkeys(_KINDS, 0)
        self._children = {kind: self._start(kind) for kind in _KINDS}
        self.restarts = 0

    def _start(self, kind: str) -> Child[launch.LauncherToHost]:
        name, options = _KINDS[kind]

        def received(message: launch.LauncherToHost, fds: list[int]) -> None:
            self._failed_starts[kind] = 0
            self._listener.from_launcher(message, fds)

        return Child(
            name,
            "piehost.host.sandbox.launcher",
            options,
            launch.LauncherToHost,
            received,
            lambda: self._lost(kind),
        )

    def spawn(self, message: launch.Spawn, fds: list[int]) -> None:
        self._children[message.kind].send(message, fds)

    def children(self) -> dict[str, int]:
        return {child.name: child.pid for child in self._children.values()}

    def close(self) -> None:
        for child in self._children.values():
            child.close()

    def _lost(self, kind: str) -> None:
        name = _KINDS[kind][0]
        self.restarts += 1
        self._failed_starts[kind] += 1
        reason = Reason(
            code="launcher_lost",
            what=f"the {name} process died",
            why="it crashed or was killed; the inferlets it started die with it",
            hint="launch again: a new one is starting",
        )
        if self._failed_starts[kind] >= _MAX_FAILED_STARTS:
            reason.hint = "run with --debug to see what it printed; `piehost doctor`"
            self._listener.launcher_failed(kind, reason)
            return
        self._children[kind] = self._start(kind)
        self._listener.launcher_lost(kind, reason)
