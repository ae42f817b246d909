"""What clients ask about the host: what runs, which model, counters."""

from __future__ import annotations

import msgspec

from piehost.wire import client as wire
from piehost.wire import control
from piehost.wire.client import HostToClient

from .clients import Client, Clients
from .core import Core
from .launchers import Launchers
from .launches import Launches
from .options import Options
from .services import Services


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
        self._waiting: dict[int, tuple[Client, wire.List | wire.AskStats]] = {}
        self._asked = 0

    def ask(self, client: Client, question: wire.List | wire.AskStats) -> None:
        self._asked += 1
        self._waiting[self._asked] = (client, question)
        if self._core.ready is None:
            self.answer(control.Stats(self._asked, control.ControllerStats(), {}))
        else:
            self._core.controller.send(control.AskStats(request=self._asked))

    def answer(self, stats: control.Stats) -> None:
        client, question = self._waiting.pop(stats.request)
        seats = self._launches.seats
        answer: HostToClient
        if isinstance(question, wire.List):
            infos = [seat.info(stats.seats.get(number)) for number, seat in seats.items()]
            answer = wire.Listing(question.request, infos)
        else:
            restarts = (self._core, self._launchers, self._services)
            answer = wire.HostStats(
                request=question.request,
                controller=stats.total,
                seats={seats[n].id: s for n, s in stats.seats.items() if n in seats},
                children=self._core.children()
                | self._launchers.children()
                | self._services.children(),
                launches=self._launches.count,
                restarts=sum(part.restarts for part in restarts),
                rings_ready=self._core.rings.ready if self._core.rings else 0,
            )
        self._clients.send(client, answer)

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

    def core_lost(self) -> None:
        """The controller that was asked is gone."""
        for number in list(self._waiting):
            self.answer(control.Stats(number, control.ControllerStats(), {}))
