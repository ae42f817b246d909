"""The store and the egress broker: processes of the host, started when they are first called.

A call that waits when its process dies is answered `unavailable`; the next one starts it anew,
unless it keeps dying.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from inferlet.errors import UnavailableError
from msgspec import Struct

from piehost.wire import services

from .children import Child
from .family import Family
from .seats import Seat

ErrorAnswer = tuple[int, str, str]  # code of the ABI, message, hint
Answer = Callable[[Any, ErrorAnswer | None], None]

_MAX_STARTS: Final = 5  # of one process ...
_STARTS_SECONDS: Final = 60.0  # ... within so long


class _Known(Struct, eq=False):
    """A seat as a running process knows it."""

    family: Family
    grant: services.Grant
    octets: int = 0  # of its egress, told by this process


class Service:
    """One process, whether it runs or not."""

    def __init__(self, name: str, module: str, arguments: Callable[[], list[str]]) -> None:
        """`arguments` are made at each start; OSError says why it cannot be started."""
        self.restarts = 0
        self._name = name
        self._module = module
        self._arguments = arguments
        self._child: Child[services.ServiceToHost] | None = None
        self._starts: deque[float] = deque(maxlen=_MAX_STARTS)  # when
        self._waiting: dict[int, tuple[Seat, Answer]] = {}  # by number of the call
        self._known: dict[int, _Known] = {}  # by number of the seat
        self._calls = 0

    def processes(self) -> list[Child[Any]]:
        return [self._child] if self._child is not None else []

    def ask(self, seat: Seat, call: services.StoreCall | services.HttpCall, answer: Answer) -> None:
        """`answer` is called once, unless the seat is `gone` before."""
        try:
            child = self._running()
        except OSError as error:  # its text may hold a path, which is not for the inferlet
            print(f"piehost: the {self._name} cannot be started: {error}", file=sys.stderr)  # noqa: T201
            answer(None, self._unavailable(f"it cannot be started ({error.strerror or error})"))
            return
        self._tell_grant(child, seat)
        self._calls += 1
        self._waiting[self._calls] = (seat, answer)
        child.send(services.ServiceAsk(seat.number, self._calls, call))

    def gone(self, seat: Seat) -> None:
        """The seat is released; nothing waits for answers to it. What it has used and was not told
        of yet still counts for its family, until the process knows that it is gone."""
        if seat.number not in self._known:
            return
        self._waiting = {n: call for n, call in self._waiting.items() if call[0] is not seat}
        if self._child is not None:
            self._child.send(services.Gone(seat.number))

    def close(self) -> None:
        if self._child is not None:
            self._child.close()

    def _tell_grant(self, child: Child[services.ServiceToHost], seat: Seat) -> None:
        """Before its first call, and when others of its family have used up what they share."""
        known = self._known.get(seat.number)
        family, quota = seat.family, seat.quota
        used = known.octets if known is not None else 0
        grant = services.Grant(
            seat=seat.number,
            user=family.user,
            egress=family.egress,
            store_bytes=quota.limits.store_bytes,
            egress_bytes=max(0, used + quota.egress_bytes - family.egress_octets),
            egress_seconds=quota.egress_seconds,
        )
        if known is None:
            self._known[seat.number] = _Known(family, grant)
        elif known.grant != grant:
            known.grant = grant
        else:
            return
        child.send(grant)

    def _running(self) -> Child[services.ServiceToHost]:
        if self._child is None:
            now = time.monotonic()
            if len(self._starts) == _MAX_STARTS and now - self._starts[0] < _STARTS_SECONDS:
                raise OSError(f"it died {_MAX_STARTS} times within {_STARTS_SECONDS:.0f} seconds")
            self._starts.append(now)
            self._child = Child(
                self._name,
                self._module,
                self._arguments(),
                services.ServiceToHost,
                self._received,
                self._lost,
            )
        return self._child

    def _received(self, message: services.ServiceToHost, fds: list[int]) -> None:
        match message:
            case services.EgressUsed():
                self._used(message)
            case services.Gone():
                self._known.pop(message.seat, None)
            case services.ServiceReply():
                waiting = self._waiting.pop(message.request, None)
                if waiting is not None:
                    waiting[1](message.value, message.error)

    def _used(self, message: services.EgressUsed) -> None:
        known = self._known.get(message.seat)
        if known is not None:
            known.octets += message.octets
            known.family.egress_octets += message.octets

    def _lost(self) -> None:
        assert self._child is not None
        self.restarts += 1
        fault, self._child = self._child.fault, None
        self._known.clear()
        waiting, self._waiting = self._waiting, {}
        for _, answer in waiting.values():
            died = f"its process died before it answered{fault and f': {fault}'}"
            answer(None, self._unavailable(died))

    def _unavailable(self, why: str) -> ErrorAnswer:
        hint = "call again; if it goes on, see what `piehost serve` printed"
        return UnavailableError.code, f"the {self._name} is not there: {why}", hint


class Services:
    """Both of them."""

    def __init__(self) -> None:
        self._store = Service("store", "piehost.host.store", _store_arguments)
        self._egress = Service("egress", "piehost.host.egress", list)

    @property
    def restarts(self) -> int:
        return self._store.restarts + self._egress.restarts

    def processes(self) -> list[Child[Any]]:
        return self._store.processes() + self._egress.processes()

    def children(self) -> dict[str, int]:
        return {child.name: child.pid for child in self.processes()}

    def ask(self, seat: Seat, call: services.StoreCall | services.HttpCall, answer: Answer) -> None:
        """Passes `call` on; `answer` is called once, unless the seat is `gone` before."""
        service = self._store if isinstance(call, services.StoreCall) else self._egress
        service.ask(seat, call, answer)

    def gone(self, seat: Seat) -> None:
        self._store.gone(seat)
        self._egress.gone(seat)

    def close(self) -> None:
        self._store.close()
        self._egress.close()


def store_path() -> Path:
    """PIEHOST_STORE, else in the user's folder for state (XDG base directory specification).

    OSError if the user has no home: one without a name, say, in a container.
    """
    if override := os.environ.get("PIEHOST_STORE"):
        return Path(override).absolute()
    base = os.environ.get("XDG_STATE_HOME")
    if base and Path(base).is_absolute():
        return Path(base) / "piehost" / "store.sqlite3"
    try:
        state = Path.home() / ".local" / "state"
    except RuntimeError as error:
        raise OSError("there is no home folder; set PIEHOST_STORE to a file") from error
    return state / "piehost" / "store.sqlite3"


def _store_arguments() -> list[str]:
    path = store_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return ["--path", str(path)]
