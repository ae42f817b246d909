"""The store's loop: whatever asks have arrived are carried out together, then answered."""

from __future__ import annotations

import select

from inferlet.errors import InferletError, UnavailableError

from piehost.wire.link import Link
from piehost.wire.services import (
    Gone,
    Grant,
    HostToService,
    HttpClose,
    HttpOpen,
    HttpRead,
    HttpWrite,
    ServiceAsk,
    ServiceReply,
    StoreCall,
)

from .database import Database


class Server:
    """Serves until the host goes: LinkClosed."""

    def __init__(self, link: Link[HostToService], database: Database) -> None:
        self._link = link
        self._database = database
        self._grants: dict[int, Grant] = {}

    def run(self) -> None:
        poll = select.poll()
        while True:
            events = select.POLLIN | (select.POLLOUT if self._link.backlog else 0)
            poll.register(self._link.fileno(), events)
            poll.poll()
            self._link.flush()
            self._serve([message for message, _ in self._link.receive()])

    def _serve(self, messages: list[HostToService]) -> None:
        asks: list[tuple[ServiceAsk, tuple[str, int, StoreCall]]] = []
        for message in messages:
            if isinstance(message, Grant):
                self._grants[message.seat] = message
            elif isinstance(message, Gone):
                self._grants.pop(message.seat, None)
                self._link.send(message)
            else:
                grant = self._grants.get(message.seat)
                call = message.call
                if grant is None or isinstance(call, HttpOpen | HttpWrite | HttpRead | HttpClose):
                    why = "of this inferlet" if grant is None else f"{type(call).__name__}"
                    self._answer(message, UnavailableError(f"the store knows nothing {why}"))
                else:
                    asks.append((message, (grant.user, grant.store_bytes, call)))
        if not asks:
            return
        answers = self._database.carry_out([ask for _, ask in asks])
        for (message, _), answer in zip(asks, answers, strict=True):
            if message.seat in self._grants:  # not gone meanwhile
                self._answer(message, answer)

    def _answer(self, ask: ServiceAsk, value: object) -> None:
        if isinstance(value, InferletError):
            error = (value.code, value.message, value.hint)
            self._link.send(ServiceReply(ask.request, None, error))
        else:
            self._link.send(ServiceReply(ask.request, value))
