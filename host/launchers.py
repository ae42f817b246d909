"""The two fork servers: one for executables, one (the zygote) for Python, imports done already."""

from __future__ import annotations

import asyncio
from typing import Any, Final, Protocol

from piehost.wire import launch
from piehost.wire.client import Reason

from .children import Child, wait_before
from .log import log

# process name and options, by kind of program
_KINDS: Final[dict[str, tuple[str, list[str]]]] = {
    "native": ("launcher", []),
    "python": ("zygote", ["--preload"]),
}
_MAX_FAILED_STARTS: Final = 3  # in a row, if it has never said a word


class LauncherListener(Protocol):
    """What the launchers tell their host."""

    def from_launcher(self, message: launch.LauncherToHost, fds: list[int]) -> None: ...

    def launcher_lost(self, kind: str, reason: Reason) -> None:
        """Its inferlets are dead or dying (they have a parent-death signal). A new one starts."""

    def launcher_failed(self, kind: str, reason: Reason) -> None:
        """It cannot be started."""


class NoLauncher(Exception):
    """There is none now, and `reason` says why."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.what)
        self.reason = reason


class Launchers:
    def __init__(self, listener: LauncherListener) -> None:
        self._listener = listener
        self._failed_starts = dict.fromkeys(_KINDS, 0)
        self._have_begun: set[str] = set()  # ever
        self._lost_for: dict[str, Reason] = {}  # the latest
        self._children = {kind: self._start(kind) for kind in _KINDS}
        self.restarts = 0

    def _start(self, kind: str) -> Child[launch.LauncherToHost]:
        name, options = _KINDS[kind]
        child: Child[launch.LauncherToHost] = Child(
            name,
            "piehost.host.sandbox.launcher",
            options,
            launch.LauncherToHost,
            self._listener.from_launcher,
            lambda: self._lost(kind),
        )
        child.ping()  # the answer says that it has started
        return child

    def spawn(self, message: launch.Spawn, fds: list[int]) -> None:
        """OSError if descriptors are used up, NoLauncher if it has died and no new one is there."""
        child = self._children[message.kind]
        if child.ended:
            raise NoLauncher(self._lost_for[message.kind])
        child.send(message, fds)

    def processes(self) -> list[Child[Any]]:
        """Those that have not ended."""
        return [child for child in self._children.values() if not child.ended]

    def children(self) -> dict[str, int]:
        return {child.name: child.pid for child in self.processes()}

    def close(self) -> None:
        for child in self._children.values():
            child.close()

    def _lost(self, kind: str) -> None:
        child = self._children[kind]
        name = child.name
        self.restarts += 1
        if child.has_begun:
            self._have_begun.add(kind)
            self._failed_starts[kind] = 0
        else:
            self._failed_starts[kind] += 1
        self._lost_for[kind] = reason = Reason(
            code="launcher_lost",
            what=f"the {name} process died",
            why=f"{child.fault or 'it crashed or was killed'}; what it started dies with it",
            hint="launch again: a new one is starting",
        )
        if self._failed_starts[kind] >= _MAX_FAILED_STARTS and kind not in self._have_begun:
            reason.hint = "run with --debug to see what it printed; `piehost doctor`"
            self._listener.launcher_failed(kind, reason)
            return
        self._restart(kind)
        self._listener.launcher_lost(kind, reason)

    def _restart(self, kind: str) -> None:
        if wait := wait_before(self._failed_starts[kind]):
            asyncio.get_running_loop().call_later(wait, self._try_to_start, kind)
        else:
            self._try_to_start(kind)

    def _try_to_start(self, kind: str) -> None:
        try:
            self._children[kind] = self._start(kind)
        except OSError as error:  # no room for a process or its descriptors: there may be soon
            log(f"cannot start the {_KINDS[kind][0]}: {error}; trying again")
            self._failed_starts[kind] += 1
            self._restart(kind)
