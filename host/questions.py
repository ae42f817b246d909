"""What clients ask about the host: what runs, which model, counters."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from piehost.wire import client as wire
from piehost.wire import control
from piehost.wire.client import EXIT_NOT_FOUND, Failed, HostToClient, Reason

from . import accounts
from .clients import Client, Clients
from .core import Core
from .launchers import Launchers
from .launches import Launches
from .options import Options
from .seats import Seat
from .services import Services

Question = wire.List | wire.AskStats | wire.Inspect


class Questions:
    """The controller's counters come by message, so an answer that needs them waits for it."""

    def __init__(
        self,
        options: Options,
        core: Core,
        launchers: Launchers,
        services: Services,
        launches: Launches,
        clients: Clients,
    ) -> None:
        self._options = options
        self._core = core
        self._launchers = launchers
        self._services = services
        self._launches = launches
        self._clients = clients
        self._waiting: dict[int, Callable[[control.Stats], None]] = {}
        self._asked = 0

    def ask(self, client: Client, question: Question) -> None:
        """The answer goes to `client` when the controller has told what is needed for it."""
        seat = self._launches.find(question.id) if isinstance(question, wire.Inspect) else None

        def told(stats: control.Stats) -> None:
            self._clients.send(client, self._answer(question, stats))

        self._asked += 1
        self._waiting[self._asked] = told
        if self._core.ready is None:
            self.answer(control.Stats(self._asked, control.ControllerStats(), {}))
        else:
            number = seat.number if seat is not None else 0
            self._core.controller.send(control.AskStats(request=self._asked, seat=number))

    def answer(self, stats: control.Stats) -> None:
        self._waiting.pop(stats.request)(stats)

    def core_lost(self) -> None:
        """The controller that was asked is gone."""
        for number in list(self._waiting):
            self.answer(control.Stats(number, control.ControllerStats(), {}))

    def _answer(self, question: Question, stats: control.Stats) -> HostToClient:
        match question:
            case wire.List(request, ended):
                return wire.Listing(
                    request,
                    [self._info(seat, stats) for seat in self._launches.seats.values()],
                    list(self._launches.ended) if ended else [],
                )
            case wire.Inspect():
                return self._inspected(question, stats)
            case wire.AskStats(request):
                return self._host_stats(request, stats)

    def _info(self, seat: Seat, stats: control.Stats) -> wire.InferletInfo:
        return accounts.info(seat, stats.seats.get(seat.number))

    def _host_stats(self, request: int, stats: control.Stats) -> wire.HostStats:
        seats = self._launches.seats
        parts = (self._core, self._launchers, self._services)
        children: dict[str, int] = {}
        for part in parts:
            children |= part.children()
        return wire.HostStats(
            request=request,
            controller=stats.total,
            seats={seats[n].id: s for n, s in stats.seats.items() if n in seats},
            children=children,
            launches=self._launches.count,
            restarts=sum(part.restarts for part in parts),
            rings_ready=self._core.rings.ready if self._core.rings else 0,
        )

    # --- one inferlet --------------------------------------------------------------------------

    def _inspected(self, question: wire.Inspect, stats: control.Stats) -> wire.Inspected | Failed:
        seat = self._launches.find(question.id)
        if seat is None:
            ended = next((e for e in self._launches.ended if e.id == question.id), None)
            if ended is None:
                return not_found(question.request, question.id)
            return wire.Inspected(question.request, None, None, ended)
        details = accounts.details(seat, stats.held)
        return wire.Inspected(question.request, self._info(seat, stats), details, None)

    def answer_models(self, client: Client, question: wire.Models) -> None:
        ready = self._core.ready
        answer = wire.ModelList(
            request=question.request,
            options=self._options.as_text(),
            model=msgspec.to_builtins(ready.model) if ready else None,
            device=ready.device if ready else "",
            engine=ready.engine if ready else "",
            pages=ready.pages if ready else 0,
            load_seconds=ready.load_seconds if ready else 0.0,
        )
        self._clients.send(client, answer)


def not_found(request: int, inferlet: str) -> Failed:
    """There is no inferlet with that id."""
    reason = Reason(
        code="not_found",
        what=f"no inferlet {inferlet} is running",
        hint="piehost ps lists those that run; with --all, the last that ended too",
    )
    return Failed(request, EXIT_NOT_FOUND, reason)
