"""What tests of the egress broker share: a web server, a broker that may go there, and calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from inferlet.errors import (
    InferletError,
)

from piehost.wire.services import HttpClose, HttpOpen, HttpRead

from .service_harness import Service
from .web_server import Request, WebServer


@pytest.fixture
def web() -> Iterator[WebServer]:
    with WebServer() as server:
        yield server


@pytest.fixture
def broker(web: WebServer) -> Iterator[Service]:
    """Seat 1 may go to `web` by its address."""
    with Service("piehost.host.egress") as service:
        service.grant(egress=[web.place])
        yield service


def get(url: str, stream: int = 1, **headers: str) -> HttpOpen:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return HttpOpen(stream, "GET", url, b"", named, False)


def post(url: str, body: bytes = b"", stream: int = 1, more: bool = False, **headers: str) -> Any:
    return HttpOpen(stream, "POST", url, body, headers, more)


def read_all(broker: Service, stream: int = 1, seat: int = 1) -> bytes:
    body = b""
    while part := broker.ask(HttpRead(stream), seat):
        assert len(part) <= 60000
        body += part
    return body


def fetch(broker: Service, url: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """A whole GET on a stream of its own."""
    try:
        status, head = broker.ask(get(url, 99, **headers))
        return status, head, read_all(broker, 99)
    finally:
        broker.ask(HttpClose(99))


def refused(broker: Service, call: HttpOpen, kind: type[InferletError], why: str = ".") -> str:
    """Opening is refused with this error, and says what to try."""
    with pytest.raises(kind, match=why) as caught:
        broker.ask(call)
    broker.ask(HttpClose(call.stream))
    return str(caught.value)


def to(location: str, status: int = 302) -> Callable[[Request], None]:
    def redirect(request: Request) -> None:
        request.body()
        request.answer(b"moved", status, Location=location)

    return redirect
