"""What inferlets ask of the host: the store, the web, children, what is left of quotas.

Handles and bounds are checked here; the host carries the calls out and replies by number. A reply
for an inferlet that has ended meanwhile is dropped, and so is one for a stream closed meanwhile.
Towards the host a stream goes by a number that is never used twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec
from inferlet import abi, errors
from inferlet.errors import (
    ArgumentError,
    ClosedError,
    HandleError,
    InferletError,
    QuotaError,
    UnavailableError,
)

from piehost.wire import services
from piehost.wire.control import Ask, Reply
from piehost.wire.services import Call

from .names import check_name
from .seat import Seat, unused

MAX_ASKED: Final = 64  # calls of one inferlet that the host has not replied to
MAX_ASKED_BYTES: Final = 1 << 20  # octets of data in them
_MOST_TEXT: Final = 1000  # characters of an error of the host that are passed on

Replied = Callable[[InferletError | None], None]


class Stream:
    """An HTTP exchange. `asked` are the numbers of its calls that the host owes replies to."""

    __slots__ = ("asked", "number", "reading")

    def __init__(self, number: int) -> None:
        self.number = number
        self.asked: set[int] = set()
        self.reading = False  # an http_read waits


class _Asked:
    __slots__ = ("octets", "replied", "request", "seat")

    def __init__(self, seat: Seat, request: int | None, octets: int, replied: Replied) -> None:
        self.seat = seat
        self.request = request
        self.octets = octets
        self.replied = replied


class Services:
    """`send` takes messages to the host; `left` says what is left of the controller's quotas."""

    def __init__(
        self, send: Callable[[Ask], None], left: Callable[[Seat], dict[str, float]]
    ) -> None:
        self._send = send
        self._left = left
        self._asked: dict[int, _Asked] = {}
        self._number = 0
        self.handlers: dict[type[abi.Command], Callable[[Seat, Any], None]] = {
            abi.StoreGet: self._store_get,
            abi.StoreSet: self._store_set,
            abi.StoreDelete: self._store_delete,
            abi.StoreExists: self._store_exists,
            abi.StoreList: self._store_list,
            abi.HttpGet: self._http_get,
            abi.HttpPost: self._http_post,
            abi.HttpWrite: self._http_write,
            abi.HttpRead: self._http_read,
            abi.HttpClose: self._http_close,
            abi.Quota: self._quota,
        }

    # --- asking and replying --------------------------------------------------

    def ask(
        self, seat: Seat, request: int | None, call: Call, octets: int, replied: Replied
    ) -> int:
        """Passes a call on; its reply answers `request`, after `replied` was called with its error
        or None. Returns the number of the call. QuotaError if too much is asked already."""
        if len(seat.asked) >= MAX_ASKED or seat.asked_bytes + octets > MAX_ASKED_BYTES:
            raise QuotaError(
                f"{len(seat.asked)} calls with {seat.asked_bytes} octets wait for the host; the "
                f"most are {MAX_ASKED} with {MAX_ASKED_BYTES}",
                "wait for some of their answers first",
            )
        number = self._next()
        self._asked[number] = _Asked(seat, request, octets, replied)
        seat.asked.add(number)
        seat.asked_bytes += octets
        self._send(Ask(seat.number, number, call))
        return number

    def tell(self, seat: Seat, call: Call) -> None:
        """Passes a call on whose reply nobody waits for."""
        self._send(Ask(seat.number, self._next(), call))

    def reply(self, message: Reply) -> None:
        asked = self._forget(message.request)
        if asked is None:
            return
        error = _error(message)
        asked.replied(error)
        if error is not None:
            asked.seat.fail(asked.request, error)
        else:
            asked.seat.answer(asked.request, message.value)

    def forget(self, seat: Seat) -> None:
        """The inferlet has ended."""
        for number in list(seat.asked):
            self._forget(number)
        seat.streams.clear()

    def _forget(self, number: int) -> _Asked | None:
        asked = self._asked.pop(number, None)
        if asked is not None:
            asked.seat.asked.remove(number)
            asked.seat.asked_bytes -= asked.octets
        return asked

    def _next(self) -> int:
        self._number += 1
        return self._number

    # --- the store ------------------------------------------------------------

    def _store_get(self, seat: Seat, c: abi.StoreGet) -> None:
        check_name(c.key)
        self.ask(seat, c.req, services.StoreGet(c.key), 0, _nothing)

    def _store_set(self, seat: Seat, c: abi.StoreSet) -> None:
        check_name(c.key)
        self.ask(seat, c.req, services.StoreSet(c.key, c.value), len(c.value), _nothing)

    def _store_delete(self, seat: Seat, c: abi.StoreDelete) -> None:
        check_name(c.key)
        self.ask(seat, c.req, services.StoreDelete(c.key), 0, _nothing)

    def _store_exists(self, seat: Seat, c: abi.StoreExists) -> None:
        check_name(c.key)
        self.ask(seat, c.req, services.StoreExists(c.key), 0, _nothing)

    def _store_list(self, seat: Seat, c: abi.StoreList) -> None:
        check_name(c.prefix)
        check_name(c.after)
        self.ask(seat, c.req, services.StoreList(c.prefix, c.after), 0, _nothing)

    # --- the web --------------------------------------------------------------

    def _http_get(self, seat: Seat, c: abi.HttpGet) -> None:
        self._open(seat, c, "GET", b"", False)

    def _http_post(self, seat: Seat, c: abi.HttpPost) -> None:
        self._open(seat, c, "POST", c.body, c.more)

    def _open(
        self, seat: Seat, c: abi.HttpGet | abi.HttpPost, method: str, body: bytes, more: bool
    ) -> None:
        unused(seat.streams, c.stream, "stream")
        size = len(c.url.encode())
        if size > abi.MAX_URL_BYTES:
            raise ArgumentError(
                f"a URL of {size} octets; the most is {abi.MAX_URL_BYTES}", "send data in a body"
            )
        if len(seat.streams) >= seat.limits.http_streams:
            raise QuotaError(
                f"{len(seat.streams)} streams are open; the cap is {seat.limits.http_streams}",
                "http_close those done with, or launch with a larger --quota http_streams",
            )
        stream = Stream(self._next())

        def replied(error: InferletError | None) -> None:
            if error is not None:
                del seat.streams[c.stream]  # nothing was opened

        octets = size + len(body) + sum(len(k) + len(v) for k, v in c.headers.items())
        call = services.HttpOpen(stream.number, method, c.url, body, c.headers, more)
        self._ask_of(stream, seat, c.req, call, octets, replied)
        seat.streams[c.stream] = stream

    def _http_write(self, seat: Seat, c: abi.HttpWrite) -> None:
        stream = _stream(seat, c.stream)
        call = services.HttpWrite(stream.number, c.data, c.more)
        self._ask_of(stream, seat, c.req, call, len(c.data), _nothing)

    def _http_read(self, seat: Seat, c: abi.HttpRead) -> None:
        stream = _stream(seat, c.stream)
        if c.req is None:
            raise ArgumentError(
                "http_read without a request id", "give one: what was read is its answer"
            )
        if stream.reading:
            raise ArgumentError(
                f"an http_read of stream {c.stream} waits already", "wait for its answer first"
            )

        def replied(error: InferletError | None) -> None:
            stream.reading = False

        self._ask_of(stream, seat, c.req, services.HttpRead(stream.number), 0, replied)
        stream.reading = True

    def _http_close(self, seat: Seat, c: abi.HttpClose) -> None:
        stream = _stream(seat, c.stream)
        del seat.streams[c.stream]
        self.tell(seat, services.HttpClose(stream.number))
        for number in stream.asked:  # they count until the host has replied
            asked = self._asked[number]
            seat.fail(asked.request, ClosedError("the stream was closed", "read it first"))
            asked.request, asked.replied = None, _nothing
        seat.answer(c.req, None)

    def _ask_of(
        self,
        stream: Stream,
        seat: Seat,
        request: int | None,
        call: Call,
        octets: int,
        replied: Replied,
    ) -> None:
        number = 0

        def done(error: InferletError | None) -> None:
            stream.asked.discard(number)
            replied(error)

        number = self.ask(seat, request, call, octets, done)
        stream.asked.add(number)

    # --- quotas ---------------------------------------------------------------

    def _quota(self, seat: Seat, c: abi.Quota) -> None:
        self.ask(seat, c.req, services.Quota(self._left(seat)), 0, _nothing)


def _nothing(error: InferletError | None) -> None:
    """Nothing is to be done about the reply but to pass it on."""


def _error(reply: Reply) -> InferletError | None:
    if reply.error is not None:
        code, message, hint = reply.error
        return errors.from_answer(code, message[:_MOST_TEXT], hint[:_MOST_TEXT])
    size = len(msgspec.msgpack.encode(reply.value))
    if size > abi.MAX_FRAME_BYTES - 64:
        return UnavailableError(
            f"the answer has {size} octets, which do not fit a frame", "ask for less at a time"
        )
    return None


def _stream(seat: Seat, handle: int) -> Stream:
    stream = seat.streams.get(handle)
    if stream is None:
        raise HandleError(f"no stream has handle {handle}", "http_get or http_post first")
    return stream
