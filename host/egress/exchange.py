"""One request to one server, on a connection of its own that ends with it (aiohttp inside).

Nothing of the environment counts: no proxy, no netrc, no cookies. A connection is made to exactly
the addresses given.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from ipaddress import ip_address
from typing import Final

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from .addresses import Address
from .target import Target

READ_AHEAD: Final = 65536  # octets of a body; twice this is buffered at most (and the kernel's)
_MAX_LINE: Final = 8190  # octets of one line of a response's head; aiohttp takes 128 of them
_DEFAULT_HEADERS: Final = {"User-Agent": "piehost", "Accept-Encoding": "gzip, deflate"}
_NO_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=None)  # stopwatch.py's task


@contextlib.asynccontextmanager
async def exchange(
    method: str,
    target: Target,
    addresses: Sequence[Address],
    headers: Mapping[str, str],
    body: bytes | AsyncIterator[bytes] | None,
) -> AsyncIterator[aiohttp.ClientResponse]:
    """The response once its head is there, its body not decoded; redirects are responses.

    aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError or OSError if it fails.
    """
    sockets: list[socket.socket] = []

    def connect(info: tuple[int, int, int, str, tuple[object, ...]]) -> socket.socket:
        if ip_address(str(info[4][0])) not in addresses:
            raise OSError(f"{info[4][0]} was not checked")
        sock = socket.socket(info[0], info[1], info[2])
        sockets.append(sock)
        return sock

    connector = aiohttp.TCPConnector(
        resolver=_Known(addresses),
        use_dns_cache=False,
        force_close=True,
        ssl=_verified() if target.scheme == "https" else False,
        socket_factory=connect,
    )
    session = aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=_NO_TIMEOUT,
        auto_decompress=False,
        trust_env=False,
        read_bufsize=READ_AHEAD,
        max_line_size=_MAX_LINE,
        max_field_size=_MAX_LINE,
        headers=_DEFAULT_HEADERS,
    )
    try:
        response = await session.request(
            method, target.url, headers=headers, data=body, allow_redirects=False
        )
        try:
            yield response
        finally:
            response.close()
    finally:
        for sock in sockets:  # closing alone would wait for a peer that reads no more
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        await session.close()


@functools.cache
def _verified() -> ssl.SSLContext:
    """Certificates and names are checked against the system's roots."""
    return ssl.create_default_context()


class _Known(AbstractResolver):
    """Answers with the addresses that were found and checked."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self._addresses
        ]

    async def close(self) -> None:
        pass
