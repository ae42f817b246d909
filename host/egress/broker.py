"""The broker's loop: the host's messages to the streams of seats, and their answers back."""

from __future__ import annotations

import asyncio
import functools
from typing import Final

from inferlet.errors import HandleError, InferletError, UnavailableError

from piehost.wire.link import Link, LinkClosed
from piehost.wire.services import (
    EgressUsed,
    Gone,
    Grant,
    HostToService,
    HttpClose,
    HttpOpen,
    HttpRead,
    HttpWrite,
    ServiceAsk,
    ServiceReply,
)

from .account import Account
from .lookup import Lookups
from .stream import Stream

# The quota `http_streams` is the controller's to keep, and it uses no number of a stream twice.
# A stream that could not be opened is free again for the controller, which does not close it. What
# was asked of it before that was known is still answered with the reason.
MAX_REMEMBERED: Final = 64


class Broker:
    """Made inside a running loop."""

    def __init__(self, link: Link[HostToService]) -> None:
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self._lookups = Lookups()
        self._accounts: dict[int, Account] = {}
        self._streams: dict[int, dict[int, Stream]] = {}  # by seat and stream
        self._tasks: set[asyncio.Task[None]] = set()  # also of streams that are being closed

    async def serve(self) -> None:
        """Until the host goes."""
        self._loop.add_reader(self._link.fileno(), self._readable)
        await self._ended

    def _readable(self) -> None:
        try:
            for message, _ in self._link.receive():
                self._take(message)
        except LinkClosed:
            self._end()

    def _take(self, message: HostToService) -> None:
        if isinstance(message, Grant):
            if (account := self._accounts.get(message.seat)) is not None:
                account.update(message)
            else:
                report = functools.partial(self._used, message.seat)
                self._accounts[message.seat] = Account(message, report)
        elif isinstance(message, Gone):
            self._accounts.pop(message.seat, None)
            for stream in self._streams.pop(message.seat, {}).values():
                stream.close()
            self._send(message)  # behind the last of what it used
        else:
            try:
                self._ask(message)
            except InferletError as error:
                self._answer(message.request, error)

    def _ask(self, message: ServiceAsk) -> None:
        seat, request, call = message.seat, message.request, message.call
        match call:
            case HttpOpen():
                self._open(seat, request, call)
            case HttpRead():
                self._stream(seat, call.stream).read(request)
            case HttpWrite():
                self._stream(seat, call.stream).write(request, call.data, call.more)
            case HttpClose():
                self._stream(seat, call.stream).close()
                del self._streams[seat][call.stream]
                self._answer(request, None)
            case _:
                raise UnavailableError(f"the egress broker knows no {type(call).__name__}")

    def _open(self, seat: int, request: int, call: HttpOpen) -> None:
        account = self._accounts.get(seat)
        if account is None:
            raise UnavailableError("the egress broker was not told of this inferlet")
        streams = self._streams.setdefault(seat, {})
        nothing = [number for number, stream in streams.items() if stream.came_to_nothing]
        for number in nothing[:-MAX_REMEMBERED]:
            del streams[number]
        answer = functools.partial(self._answer_living, seat)
        stream = Stream(call, request, account, self._lookups, answer)
        streams[call.stream] = stream
        self._tasks.add(stream.task)
        stream.task.add_done_callback(self._tasks.discard)

    def _stream(self, seat: int, handle: int) -> Stream:
        stream = self._streams.get(seat, {}).get(handle)
        if stream is None:
            raise HandleError(
                f"there is no stream {handle}", "http_get or http_post makes it, http_close ends it"
            )
        return stream

    # --- to the host ------------------------------------------------------------------------

    def _answer_living(self, seat: int, request: int, value: object) -> None:
        if seat in self._accounts:
            self._answer(request, value)

    def _answer(self, request: int, value: object) -> None:
        if isinstance(value, InferletError):
            error = (value.code, value.message, value.hint)
            self._send(ServiceReply(request, None, error))
        else:
            self._send(ServiceReply(request, value))

    def _used(self, seat: int, octets: int) -> None:
        self._send(EgressUsed(seat, octets))

    def _send(self, message: ServiceReply | EgressUsed | Gone) -> None:
        try:
            self._link.send(message)
        except LinkClosed:
            self._end()
            return
        if self._link.backlog:
            self._loop.add_writer(self._link.fileno(), self._writable)

    def _writable(self) -> None:
        try:
            self._link.flush()
        except LinkClosed:
            self._end()
        if not self._link.backlog:
            self._loop.remove_writer(self._link.fileno())

    def _end(self) -> None:
        self._loop.remove_reader(self._link.fileno())
        self._loop.remove_writer(self._link.fileno())
        if not self._ended.done():
            self._ended.set_result(None)
