"""A response's body, part by part: decoded with bounds, and counted."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from typing import Any, Final

import aiohttp
from inferlet.abi import MAX_MESSAGE_BYTES
from inferlet.errors import UnavailableError

_GZIP: Final = 16 + zlib.MAX_WBITS
_GZIP_MAGIC: Final = 0x1F  # its first octet
_CODINGS: Final = frozenset({"gzip", "x-gzip", "deflate"})


def is_decoded(coding: str) -> bool:
    """Whether `Body` decodes what has this Content-Encoding; any other comes as it is."""
    return coding.strip().lower() in _CODINGS


class Body:
    """`charge(octets)` is told what each part costs: the octets received, or those they decode to
    if that is more, so that neither a bomb nor a stream that decodes to nothing is free."""

    def __init__(self, response: aiohttp.ClientResponse, charge: Callable[[int], None]) -> None:
        self._content = response.content
        connection = response.connection  # None once the whole body is here
        protocol = connection.protocol if connection is not None else None
        self._closed = protocol.closed if protocol is not None else None
        if self._closed is not None:
            self._closed.add_done_callback(_look)
        self._charge = charge
        coding = response.headers.get("Content-Encoding", "")
        self._decoding = is_decoded(coding)
        self._gzip = "gzip" in coding.lower()
        self._decoder: zlib._Decompress | None = None
        self._input = b""  # received, not decoded
        self._pending = False  # the decoder may hold more although its input is used up
        self._received = 0
        self._decoded = 0
        self._charged = 0

    async def next_part(self) -> bytes:
        """The next 1 to 60,000 octets, empty at the end.

        UnavailableError if they are not what Content-Encoding says, what `charge` raises, and what
        reading from the connection does (see `exchange`).
        """
        while True:
            if not self._decoding:
                part = await self._receive()
                self._count(len(part), len(part))
                return part
            part = self._decode()
            if part:
                self._count(0, len(part))
                return part
            if self._input:
                continue
            received = await self._receive()
            self._count(len(received), 0)
            if not received:
                self._check_end()
                return b""
            self._input = received

    async def _receive(self) -> bytes:
        reading = asyncio.ensure_future(self._content.read(MAX_MESSAGE_BYTES))
        reading.add_done_callback(_look)
        try:
            # aiohttp closes the connection at a malformed chunk, and leaves who waits to wait
            waits: list[asyncio.Future[Any]] = [reading]
            if self._closed is not None:
                waits.append(self._closed)
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                return reading.result()
        except RuntimeError:
            pass  # aiohttp's, at the next read after that
        finally:
            reading.cancel()
        raise UnavailableError(
            "the server's body breaks off before its end, or is not chunked as it says",
            "ask for it again",
        )

    def _count(self, received: int, decoded: int) -> None:
        self._received += received
        self._decoded += decoded
        cost = max(self._received, self._decoded) - self._charged
        if cost > 0:
            self._charged += cost
            self._charge(cost)

    def _decode(self) -> bytes:
        if not self._input and not self._pending:
            return b""
        decoder = self._decoder
        if decoder is not None and decoder.eof:
            if not self._gzip or self._input[0] != _GZIP_MAGIC:
                self._input = b""  # padding, which gzip(1) ignores too
                return b""
            decoder = None  # another member
        if decoder is None:
            decoder = self._decoder = zlib.decompressobj(self._window())
        try:
            part = decoder.decompress(self._input, MAX_MESSAGE_BYTES)
        except zlib.error as error:
            raise UnavailableError(
                f"the server's compressed body is damaged: {error}",
                "ask for it uncompressed: the header Accept-Encoding: identity",
            ) from None
        self._input = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
        self._pending = len(part) == MAX_MESSAGE_BYTES and not decoder.eof
        return part

    def _window(self) -> int:
        if self._gzip:
            return _GZIP
        # "deflate" means zlib's format; servers that send it without the header are common
        return zlib.MAX_WBITS if self._input[0] & 0x0F == 8 else -zlib.MAX_WBITS

    def _check_end(self) -> None:
        if self._decoder is not None and not self._decoder.eof:
            raise UnavailableError(
                "the server's compressed body breaks off before its end", "ask for it again"
            )


def _look(future: asyncio.Future[Any]) -> None:
    """Else asyncio writes a traceback if nobody does: it failed as somebody else gave up."""
    if not future.cancelled():
        future.exception()
