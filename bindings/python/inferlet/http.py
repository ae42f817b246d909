"""HTTP through the host: to the hosts that the launch granted (`--egress`) and to no others."""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .abi import (
    MAX_FRAME_BYTES,
    MAX_HTTP_HEADERS,
    MAX_MESSAGE_BYTES,
    MAX_URL_BYTES,
    Command,
    HttpClose,
    HttpGet,
    HttpPost,
    HttpRead,
    HttpWrite,
)
from .checks import headers as check_headers
from .checks import octets, text, wrong_type
from .errors import ArgumentError, ClosedError, InferletError
from .future import Answer, Composite, Future, Steps, nothing, same
from .runtime import Runtime, runtime
from .scope import Scoped
from .series import Series

_WRITES = 4  # parts of a body on their way at once


def http_get(url: str, *, headers: Mapping[str, str] = {}) -> Response:
    """GET. Redirects are followed, to granted hosts only.

    ArgumentError if the URL is longer than 8,192 octets or there are more than 64 headers.
    Waiting for the response fails with DeniedError (a host nobody granted), UnavailableError (it
    cannot be reached, or is too slow) or QuotaError; a status of 400 or more is no error.
    """
    to, given = _target(url, headers)
    return Response(runtime, lambda stream: HttpGet(None, stream, to, given))


def http_post(
    url: str, body: bytes | str | Iterable[bytes] = b"", *, headers: Mapping[str, str] = {}
) -> Response:
    """POST; raises and fails as `http_get`.

    A body that no single frame holds, or an iterable of parts, is sent while the program waits
    for the response, a few parts ahead of what the host has taken.
    """
    to, given = _target(url, headers)
    if isinstance(body, str | bytes | bytearray | memoryview):
        whole = octets("the body", body)
        names = sum(len(k.encode()) + len(v.encode()) + 10 for k, v in given.items())
        if len(whole) + len(to.encode()) + names <= MAX_MESSAGE_BYTES:
            return Response(runtime, lambda stream: HttpPost(None, stream, to, whole, given))
        body = [whole]
    elif not isinstance(body, Iterable):
        raise wrong_type("the body", body, "bytes, str, or an iterable of bytes")
    return Response(
        runtime, lambda stream: HttpPost(None, stream, to, b"", given, True), _parts(body)
    )


def _target(url: str, headers: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    given = check_headers(headers, MAX_HTTP_HEADERS, MAX_FRAME_BYTES)
    return text("the URL", url, MAX_URL_BYTES, 1), given


def _parts(body: Iterable[bytes]) -> Iterator[bytes]:
    """`body` in parts that a command holds; none is empty."""
    for given in body:
        data = octets("a part of the body", given)
        for at in range(0, len(data), MAX_MESSAGE_BYTES):
            yield data[at : at + MAX_MESSAGE_BYTES]


@dataclass(frozen=True, slots=True)
class Head:
    """What comes before the body."""

    status: int
    headers: dict[str, str]  # names in lower case


class Response(Scoped, Series[bytes]):
    """A response: `status` and `headers`, which wait (or `await` the response, or its `head`), and
    the body: whole by `read`, `text` and `json`, or in parts by `for` and `async for`.

    Closed at the end of its body, by `close`, with its `with` block, or when nothing refers to it
    any more. At most `limits.http_streams` are open at once.
    """

    def __init__(
        self,
        runtime: Runtime,
        request: Callable[[int], Command],
        parts: Iterator[bytes] | None = None,
    ) -> None:
        """`request` makes the command for a stream; `parts` are the rest of its body, if it has
        said that there is more."""
        super().__init__(runtime.connection)
        self._number = 0  # until it is asked for
        number = runtime.new_handle()
        answer = self.connection.ask(request(number), _HeadAnswer(self))
        self._number = number
        self._ended = False
        self._body: Future[bytes] | None = None
        self.head: Future[Head] = (
            answer if parts is None else Composite(self._upload(answer, parts))
        )

    def __await__(self) -> Generator[Any, None, Response]:
        yield from self.head.__await__()
        return self

    def __del__(self) -> None:
        if number := getattr(self, "_number", 0):  # not there if the constructor raised
            self.connection.release(HttpClose(None, number))

    @property
    def status(self) -> int:
        """The status code; waits for the response and raises what it fails with."""
        return self.head.result().status

    @property
    def headers(self) -> dict[str, str]:
        """The headers, names in lower case; waits for the response."""
        return self.head.result().headers

    def read(self) -> Future[bytes]:
        """The whole body, or what was not read in parts. QuotaError beyond the egress quota;
        ClosedError if the response was closed before its end."""
        if self._body is None:
            self._body = Composite(self._rest())
        return self._body

    def text(self) -> Future[str]:
        """The body as text, in the charset that the headers name, else UTF-8; octets that are no
        text become U+FFFD."""

        def steps() -> Steps[str]:
            body: bytes = yield self.read()
            try:
                return body.decode(_charset(self.headers), "replace")
            except LookupError:
                return body.decode("utf-8", "replace")

        return Composite(steps())

    def json(self) -> Future[Any]:
        """The body as JSON. ArgumentError if it is none."""

        def steps() -> Steps[Any]:
            body: bytes = yield self.read()
            try:
                return json.loads(body)
            except ValueError as error:
                raise ArgumentError(
                    f"the body of {len(body)} octets is no JSON: {error}",
                    "look at the status and the content-type first",
                ) from None

        return Composite(steps())

    def close(self) -> None:
        """Ends the stream, whatever was read; nothing if it has ended."""
        number, self._number = self._number, 0
        if number:
            with contextlib.suppress(ClosedError):
                self.connection.append(HttpClose(None, number))

    def _leave(self) -> None:
        self.close()

    def forget(self) -> None:
        """The stream was never opened, so there is nothing to close."""
        self._number = 0

    def _ask(self) -> Future[bytes]:
        if not self._number:
            why = "the body has ended" if self._ended else "the response was closed"
            raise ClosedError(why, "ask again for another response")
        return Composite(self._part())

    def _part(self) -> Steps[bytes]:
        yield self.head
        if self._number:
            part: bytes = yield self._ask_stream(HttpRead(None, self._number), same)
            if part:
                return part
            self._ended = True
            self.close()
        raise ClosedError("the body has ended", "ask again for another response")

    def _rest(self) -> Steps[bytes]:
        yield self.head
        parts: list[bytes] = []
        while not self._ended:
            try:
                part: bytes = yield self._next()
                parts.append(part)
            except ClosedError:
                if not self._ended:
                    raise
        return b"".join(parts)

    def _upload(self, answer: Answer[Head], parts: Iterator[bytes]) -> Steps[Head]:
        on_their_way: deque[Future[None]] = deque()
        try:
            for part in parts:
                on_their_way.append(self._write(part, more=True))
                if len(on_their_way) == _WRITES:
                    yield on_their_way.popleft()
            on_their_way.append(self._write(b"", more=False))
            while on_their_way:
                yield on_their_way.popleft()
        except InferletError:
            if not answer.answered:  # else that tells what happened: a refusal, or a response
                self.close()
                raise
        except Exception:  # of the caller's own parts
            self.close()
            raise
        head: Head = yield answer
        return head

    def _write(self, data: bytes, more: bool) -> Future[None]:
        if not self._number:
            raise ClosedError("the response was closed", "keep it open until it has come")
        return self._ask_stream(HttpWrite(None, self._number, data, more), nothing)

    def _ask_stream(self, command: Command, convert: Callable[[Any], Any]) -> Answer[Any]:
        return self.connection.ask(command, Answer(self.connection, convert))


class _HeadAnswer(Answer[Head]):
    """What `http_get` and `http_post` answer. Refers to the response, so that it is not collected
    while somebody waits, and lets it know if there is no stream to close."""

    __slots__ = ("_response",)

    def __init__(self, response: Response) -> None:
        super().__init__(response.connection, _head)
        self._response: Response | None = response

    def fail(self, error: Exception) -> None:
        if self._response is not None:
            self._response.forget()
        super().fail(error)

    def _settle(self) -> None:
        self._response = None
        super()._settle()


def _head(answer: Any) -> Head:
    status, headers = answer
    return Head(status, {name.lower(): value for name, value in headers.items()})


def _charset(headers: Mapping[str, str]) -> str:
    """That of the content-type."""
    for parameter in headers.get("content-type", "").split(";")[1:]:
        name, _, value = parameter.strip().partition("=")
        if name.strip().lower() == "charset":
            return value.strip().strip('"')
    return "utf-8"
