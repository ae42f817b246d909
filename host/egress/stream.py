"""One stream of an inferlet: a request, its redirects, its body both ways.

A stream is one task. What the inferlet asks meanwhile waits here: at most one part of a body is on
its way in each direction, so a slow peer holds up its own stream and nothing is read ahead.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Final

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from inferlet.errors import (
    ArgumentError,
    ClosedError,
    InferletError,
    QuotaError,
    UnavailableError,
)

from piehost.wire.services import HttpOpen

from .account import Account
from .body import Body, is_decoded
from .exchange import exchange
from .lookup import Lookups
from .stopwatch import Stopwatch
from .target import REDIRECTS, Target, check_headers, headers_after, parse_target, redirected

MAX_REDIRECTS: Final = 5
MAX_WAITING: Final = 64  # reads, and writes, of one stream; the controller allows fewer
_MAX_HEAD_BYTES: Final = 32768  # of a response's headers: the answer must fit into a frame

# Called with the number of an ask and its answer's value, or the error it is answered with.
Answer = Callable[[int, object], None]


class Stream:
    """Answers `request`, and what is asked of it later, until `close`."""

    def __init__(
        self, call: HttpOpen, request: int, account: Account, lookups: Lookups, answer: Answer
    ) -> None:
        self._call = call
        self._account = account
        self._lookups = lookups
        self._answer = answer
        self._opening: int | None = request
        self._opened = False
        self._reads: deque[int] = deque()
        self._writes: deque[tuple[int, bytes]] = deque()
        self._more = call.more  # the inferlet has not ended its body yet
        self._uploading = call.more  # and somebody takes what it writes
        self._starved = False  # the upload waits for the inferlet
        self._at_end = False
        self._failure: InferletError | None = None
        self._asked_to_read = asyncio.Event()
        self._asked_to_write = asyncio.Event()
        self._stopwatch = Stopwatch(account.seconds, self._too_late)
        self.task = asyncio.create_task(self._run())
        self._tick()

    # --- what the inferlet asks -------------------------------------------------------------

    def read(self, request: int) -> None:
        """Answered with the next part of the body, empty at its end."""
        if self._failure is not None:
            self._answer(request, self._failure)
        elif self._at_end:
            self._answer(request, b"")
        elif len(self._reads) >= MAX_WAITING:
            self._answer(request, _too_many("http_read"))
        else:
            self._reads.append(request)
            self._asked_to_read.set()
            self._tick()

    def write(self, request: int, data: bytes, more: bool) -> None:
        """Answered with nil once the connection has taken the data."""
        if self._failure is not None:
            self._answer(request, self._failure)
        elif not self._more:
            self._answer(
                request,
                ArgumentError(
                    "the body of this request is complete",
                    "http_post with more=True, and more=True on every http_write but the last",
                ),
            )
        elif not self._uploading:
            self._answer(request, _taken_no_more())
        elif len(self._writes) >= MAX_WAITING:
            self._answer(request, _too_many("http_write"))
        else:
            try:
                self._account.charge(len(data))
            except QuotaError as error:  # the server must not take what it has for the whole
                self._answer(request, error)
                self._stop(error)
                return
            self._more = more
            self._writes.append((request, data))
            self._asked_to_write.set()
            self._tick()

    def close(self) -> None:
        """Ends the request at once; what waits is answered with `closed`."""
        self._stop(ClosedError("the stream was closed", "read before http_close"))

    @property
    def came_to_nothing(self) -> bool:
        """It failed before there was a response."""
        return self._failure is not None and not self._opened

    # --- the request ------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            await self._follow()
            self._at_end = True
            while self._reads:
                self._answer(self._reads.popleft(), b"")
            self._end_upload()
        except InferletError as error:
            self._fail(error)
        except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
            self._fail(_unreachable(self._call.url, error))
        except Exception as error:
            traceback.print_exc()  # for the log; the inferlet gets the line below
            self._fail(
                UnavailableError(
                    f"the request failed in a way nobody foresaw: {type(error).__name__}",
                    "look into piehost's log, and report it",
                )
            )

    async def _follow(self) -> None:
        """Sends the request, follows redirects, and hands out the body until its end."""
        call, account = self._call, self._account
        if call.method not in ("GET", "POST"):
            raise ArgumentError(f"{call.method!r} is neither GET nor POST")
        account.check_left()
        check_headers(call.headers)
        grants = account.grants()
        target, method, headers = parse_target(call.url), call.method, call.headers
        for _ in range(MAX_REDIRECTS + 1):
            addresses = await self._lookups.addresses(target, grants, account.slots)
            body: bytes | AsyncIterator[bytes] | None = None
            if method == "POST":
                account.charge(len(call.body))
                body = self._upload() if call.more else call.body or None
            async with exchange(method, target, addresses, headers, body) as response:
                location = response.headers.get("Location")
                if response.status not in REDIRECTS or location is None:
                    await self._hand_out(target, response)
                    return
                status = response.status
            following = redirected(target, location)
            dropped = method == "POST" and status in (301, 302, 303)
            if method == "POST" and call.more and not dropped:
                raise UnavailableError(
                    f"{target} redirects to {following}, and the body cannot be sent again",
                    "post to that URL, or give the whole body to http_post",
                )
            if dropped:
                method = "GET"
            headers = headers_after(
                headers, same_origin=following.origin == target.origin, body_dropped=dropped
            )
            target = following
        raise UnavailableError(
            f"{call.url} redirects more than {MAX_REDIRECTS} times", "ask for where it leads"
        )

    async def _upload(self) -> AsyncIterator[bytes]:
        """The request's body as the inferlet writes it."""
        try:
            if self._call.body:
                yield self._call.body
            while self._more or self._writes:
                while not self._writes:
                    self._starved = True
                    self._tick()
                    self._asked_to_write.clear()
                    await self._asked_to_write.wait()
                self._starved = False
                self._tick()
                request, data = self._writes[0]
                yield data
                if self._writes:
                    self._writes.popleft()
                    self._answer(request, None)
        finally:
            self._end_upload()

    def _end_upload(self) -> None:
        """The body is sent, or the server has answered without waiting for the rest of it."""
        self._uploading = self._starved = False
        while self._writes:
            self._answer(self._writes.popleft()[0], _taken_no_more())
        self._tick()

    async def _hand_out(self, target: Target, response: aiohttp.ClientResponse) -> None:
        if response.status == 101:
            raise UnavailableError(f"{target} wants to speak another protocol than HTTP")
        assert self._opening is not None
        self._answer(self._opening, [response.status, _head(target, response)])
        self._opening = None
        self._opened = True
        self._tick()
        body = Body(response, self._account.charge)
        while True:
            self._asked_to_read.clear()
            while not self._reads:
                await self._asked_to_read.wait()
            part = await body.next_part()
            self._answer(self._reads.popleft(), part)
            if not part:
                return
            self._tick()

    # --- its end ----------------------------------------------------------------------------

    def _tick(self) -> None:
        """Time passes while an answer is owed that the server, not the inferlet, holds up."""
        owed = bool(self._reads or self._writes)
        opening = self._opening is not None and not self._starved
        self._stopwatch.run(self._failure is None and (owed or opening))

    def _too_late(self) -> None:
        self._stop(
            UnavailableError(
                f"{self._call.url[:200]} took longer than {self._account.seconds:g} s",
                "try again later, or launch with a larger --quota egress_seconds",
            )
        )

    def _stop(self, error: InferletError) -> None:
        self._fail(error)
        self.task.cancel()

    def _fail(self, error: InferletError) -> None:
        """Everything that waits, and everything asked from now on, gets this error."""
        if self._failure is not None:
            return
        self._failure = error
        self._stopwatch.run(False)
        waiting = [*self._reads, *(request for request, _ in self._writes)]
        if self._opening is not None:
            waiting.insert(0, self._opening)
        self._opening = None
        self._reads.clear()
        self._writes.clear()
        for request in waiting:
            self._answer(request, error)


def _head(target: Target, response: aiohttp.ClientResponse) -> dict[str, str]:
    """Names in lower case; several fields of one name as RFC 9110 joins them, cookies by lines."""
    decoded = is_decoded(response.headers.get("Content-Encoding", ""))
    head: dict[str, str] = {}
    for raw_name, raw_value in response.raw_headers:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("utf-8", "replace")
        if decoded and name in ("content-encoding", "content-length"):
            continue  # they are about the octets before they were decoded
        if name in head:
            value = head[name] + ("\n" if name == "set-cookie" else ", ") + value
        head[name] = value
    if sum(len(name) + len(value.encode()) + 8 for name, value in head.items()) > _MAX_HEAD_BYTES:
        raise UnavailableError(
            f"the headers that {target} answers with have more than {_MAX_HEAD_BYTES} octets"
        )
    return head


def _unreachable(url: str, error: Exception) -> UnavailableError:
    said = error.message if isinstance(error, aiohttp.ClientResponseError) else str(error)
    if isinstance(error, ssl.SSLError | aiohttp.ClientSSLError):
        hint = "the server needs a certificate that this machine trusts"
    elif isinstance(error, aiohttp.ClientConnectorError):
        hint = "check the host and the port, and that the server runs"
        number = error.os_error.errno  # its own text has "ssl:default" in it, also without TLS
        said = os.strerror(number) if number and number > 0 else str(error.os_error)
        said = f"cannot connect to {error.host} port {error.port}: {said}"
    else:
        hint = "try again; if it stays so, the server does not speak HTTP as it should"
    why = " ".join(said.encode("utf-8", "replace").decode()[:300].split()) or type(error).__name__
    return UnavailableError(f"{url[:200]} failed: {why}", hint)


def _taken_no_more() -> ClosedError:
    return ClosedError("the server takes no more of this request's body", "read its answer")


def _too_many(name: str) -> QuotaError:
    return QuotaError(f"{MAX_WAITING} calls of {name} wait on this stream", "wait for some first")
