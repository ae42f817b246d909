"""The egress broker: what it fetches, and its streams. A real process, real web servers."""

from __future__ import annotations

import gzip
import random
import socket
import threading
import zlib
from pathlib import Path

import psutil
import pytest
from inferlet.errors import (
    ArgumentError,
    ClosedError,
    DeniedError,
    HandleError,
    QuotaError,
    UnavailableError,
)

from piehost.wire.services import HttpCall, HttpClose, HttpRead, HttpWrite, StoreGet

from . import egress_harness
from .egress_harness import fetch, get, post, read_all
from .host_harness import eventually
from .service_harness import PATIENCE, Service
from .web_server import Request, WebServer

web, broker = egress_harness.web, egress_harness.broker  # the fixtures


# --- requests ---------------------------------------------------------------------------------


def test_get(web: WebServer, broker: Service) -> None:
    web.routes["/a"] = lambda r: r.answer(b"hello", X_Mine="yes")
    status, head = broker.ask(get(web.url("/a?b=c%20d#e"), X_Asked="äb"))
    assert (status, head["x-mine"], head["content-length"]) == (200, "yes", "5")
    assert broker.ask(HttpRead(1)) == b"hello"
    assert broker.ask(HttpRead(1)) == b""
    assert broker.ask(HttpRead(1)) == b"", "the end stays the end"
    method, path, headers = web.seen[0]
    assert (method, path) == ("GET", "/a?b=c%20d")
    assert headers["X-Asked"].encode("latin-1").decode() == "äb"
    assert headers["Host"] == web.place
    assert broker.used == {1: 5}


def test_an_error_status_is_an_answer_like_any_other(web: WebServer, broker: Service) -> None:
    web.routes["/gone"] = lambda r: r.answer(b"no", 404)
    web.routes["/empty"] = lambda r: r.head(204)
    web.routes["/nowhere"] = lambda r: r.answer(b"odd", 302)  # no Location
    assert fetch(broker, web.url("/gone"))[::2] == (404, b"no")
    assert fetch(broker, web.url("/empty"))[::2] == (204, b"")
    assert fetch(broker, web.url("/nowhere"))[::2] == (302, b"odd")


def test_post(web: WebServer, broker: Service) -> None:
    web.routes["/"] = lambda r: r.answer(r.body()[::-1])
    assert broker.ask(post(web.url("/"), b"abc"))[0] == 200
    assert read_all(broker) == b"cba"
    assert web.seen[0][2]["Content-Length"] == "3"
    assert broker.ask(post(web.url("/"), b"", 2))[0] == 200
    assert read_all(broker, 2) == b""
    assert broker.used == {1: 6}, "both ways"


def test_a_body_that_is_written_while_the_answer_is_read(web: WebServer, broker: Service) -> None:
    def echo(request: Request) -> None:
        request.head()  # no length: until the connection closes
        for part in request.parts():
            request.wfile.write(part.upper())

    web.routes["/echo"] = echo
    opened = broker.send(post(web.url("/echo"), b"first ", more=True))
    assert broker.wait(opened)[0] == 200
    assert broker.ask(HttpRead(1)) == b"FIRST "
    for part in [b"second", b"third"]:
        broker.ask(HttpWrite(1, part, True))
        assert broker.ask(HttpRead(1)) == part.upper()
    broker.ask(HttpWrite(1, b"", True))
    broker.ask(HttpWrite(1, b"last", False))
    assert read_all(broker) == b"LAST"
    with pytest.raises(ArgumentError, match="complete"):
        broker.ask(HttpWrite(1, b"more", False))


def test_writes_and_reads_may_be_asked_before_the_head_is_there(
    web: WebServer, broker: Service
) -> None:
    web.routes["/"] = lambda r: r.answer(r.body())
    read = broker.send(post(web.url("/"), b"", more=True)) and broker.send(HttpRead(1))
    parts = [bytes([65 + i]) * 50000 for i in range(8)]
    writes = [broker.send(HttpWrite(1, part, i < 7)) for i, part in enumerate(parts)]
    for request in writes:
        assert broker.wait(request) is None
    assert broker.order[: len(writes)] == writes
    body = broker.wait(read) + read_all(broker)
    assert body == b"".join(parts)


def test_a_server_that_answers_before_it_has_the_body(web: WebServer, broker: Service) -> None:
    web.routes["/"] = lambda r: r.answer(b"too large", 413)
    assert broker.ask(post(web.url("/"), b"x", more=True))[0] == 413
    assert read_all(broker) == b"too large"
    with pytest.raises(ClosedError):
        broker.ask(HttpWrite(1, b"more", True))


def test_a_large_body_comes_in_parts_and_is_not_read_ahead(web: WebServer, broker: Service) -> None:
    sent = threading.Semaphore(0)
    count = 0

    def large(request: Request) -> None:
        nonlocal count
        request.head(Content_Length=str(1 << 28))
        for _ in range(1 << 12):
            request.wfile.write(bytes(1 << 16))
            count += 1
            sent.release()

    web.routes["/"] = large
    broker.grant(egress=[web.place], egress_bytes=1 << 30)
    broker.ask(get(web.url("/")))
    while sent.acquire(timeout=0.5):
        pass  # until nothing more leaves the server
    assert count << 16 < 64 << 20, "what kernel and broker hold, not the whole"
    assert psutil.Process(broker.process.pid).memory_info().rss < 200 << 20
    assert broker.used == {}, "nothing was handed out"
    assert broker.ask(HttpRead(1)) == bytes(60000)


def test_streams_interleave_and_seats_have_their_own(web: WebServer, broker: Service) -> None:
    turn = {name: threading.Event() for name in "abc"}

    def slow(request: Request) -> None:
        name = request.path.partition("?")[2]
        turn[name].wait(PATIENCE)
        request.answer(name.encode())

    web.routes["/"] = slow
    broker.grant(2, egress=[web.place])
    asked = {
        "a": (broker.send(get(web.url("/?a"), 1)), 1, 1),
        "b": (broker.send(get(web.url("/?b"), 2)), 2, 1),
        "c": (broker.send(get(web.url("/?c"), 1), 2), 1, 2),
    }
    for name in "cba":
        turn[name].set()
        request, stream, seat = asked[name]
        assert broker.wait(request)[0] == 200
        assert read_all(broker, stream, seat) == name.encode()
    assert broker.used == {1: 2, 2: 1}


def test_headers_of_a_response(web: WebServer, broker: Service) -> None:
    def raw(request: Request) -> None:
        request.wfile.write(
            b"HTTP/1.1 200 OK\r\nVary: a\r\nVARY: b\r\nSet-Cookie: c=1, d\r\nSet-Cookie: e=2\r\n"
            b"X-Odd: \xff\xc3\xa4\r\nContent-Length: 0\r\n\r\n"
        )

    web.routes["/"] = raw
    _, head = broker.ask(get(web.url("/")))
    assert head["vary"] == "a, b"
    assert head["set-cookie"] == "c=1, d\ne=2"
    assert head["x-odd"] == "\ufffdä"
    fetch(broker, web.url("/"))
    assert "Cookie" not in web.seen[1][2], "no cookies are kept"


@pytest.mark.parametrize("coding", ["gzip", "deflate", "raw deflate", "two members", "identity"])
def test_bodies_come_decompressed(web: WebServer, broker: Service, coding: str) -> None:
    text = random.Random(0).randbytes(1000) * 200
    raw = zlib.compressobj(wbits=-15)
    octets = {
        "gzip": gzip.compress(text),
        "deflate": zlib.compress(text),
        "raw deflate": raw.compress(text) + raw.flush(),
        "two members": gzip.compress(text[:99]) + gzip.compress(text[99:]) + b"\0padding",
        "identity": text,
    }[coding]
    name = {"raw deflate": "deflate", "two members": "GZIP"}.get(coding, coding)
    web.routes["/"] = lambda r: r.answer(octets, Content_Encoding=name)
    _, head, body = fetch(broker, web.url("/"))
    assert body == text
    assert ("content-length" in head) == (coding == "identity"), "it would be the wrong one"
    assert broker.used == {1: len(text)}
    assert web.seen[0][2]["Accept-Encoding"] == "gzip, deflate"


# --- streams ----------------------------------------------------------------------------------


def test_handles(web: WebServer, broker: Service) -> None:
    web.routes["/"] = lambda r: r.answer(b"body")
    unknown: list[HttpCall] = [HttpRead(7), HttpWrite(7, b"", False), HttpClose(7)]
    for call in unknown:
        with pytest.raises(HandleError):
            broker.ask(call)
    broker.ask(get(web.url("/"), 7))
    broker.grant(2, egress=[web.place])
    with pytest.raises(HandleError):
        broker.ask(HttpRead(7), 2)
    assert read_all(broker, 7) == b"body"
    broker.ask(HttpClose(7))
    with pytest.raises(HandleError):
        broker.ask(HttpRead(7))
    with pytest.raises(UnavailableError):
        broker.ask(StoreGet("k"))


def test_where_nobody_listens(broker: Service) -> None:
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        broker.grant(2, egress=[f"127.0.0.1:{port}"])
        with pytest.raises(UnavailableError) as caught:
            broker.ask(get(f"http://127.0.0.1:{port}/"), 2)
    assert caught.value.message.endswith(f"port {port}: Connection refused")


def test_a_failed_stream_fails_all_that_is_asked_of_it(broker: Service) -> None:
    requests = [
        broker.send(call)
        for call in [post("http://10.0.0.1/", more=True), HttpRead(1), HttpWrite(1, b"x", True)]
    ]
    for request in requests:
        with pytest.raises(DeniedError):
            broker.wait(request)
    with pytest.raises(DeniedError):
        broker.ask(HttpRead(1))


def test_streams_that_could_not_be_opened_are_free_without_being_closed(
    web: WebServer, broker: Service
) -> None:
    web.routes["/"] = lambda r: r.answer(b"here")
    for stream in range(1, 600):
        with pytest.raises(DeniedError):
            broker.ask(get("http://10.0.0.1/", stream))
    with pytest.raises(DeniedError):
        broker.ask(HttpRead(599))
    with pytest.raises(HandleError):
        broker.ask(HttpRead(1))
    broker.ask(get(web.url("/"), 600))
    assert read_all(broker, 600) == b"here"


def test_as_many_streams_as_the_largest_quota_may_be_open(web: WebServer, broker: Service) -> None:
    web.routes["/"] = lambda r: r.answer(b"here")
    streams = range(1, 301)
    opened = [broker.send(get(web.url("/"), stream)) for stream in streams]
    assert [broker.wait(request)[0] for request in opened] == [200] * len(streams)
    assert read_all(broker, 1) == read_all(broker, 300) == b"here"


def test_what_a_seat_that_is_gone_has_used_is_told_before_that(
    web: WebServer, broker: Service
) -> None:
    broker.send(post(web.url("/"), b"", more=True))
    broker.send(HttpWrite(1, bytes(1000), True))
    broker.gone(1)
    while not broker.seats_gone:
        assert broker.receive(PATIENCE)
    assert (broker.used, broker.seats_gone) == ({1: 1000}, {1})


@pytest.mark.parametrize("how", ["close", "gone", "kill"])
def test_close_ends_everything_at_once(web: WebServer, broker: Service, how: str) -> None:
    closed = threading.Event()
    reached = threading.Semaphore(0)

    def silent(request: Request) -> None:
        if request.path == "/body":
            request.head()
        reached.release()
        if request.is_closed():
            closed.set()

    web.routes["/head"] = web.routes["/body"] = silent
    broker.grant(2, egress=[web.place])
    first = broker.send(get(web.url("/head"), 1))
    broker.ask(get(web.url("/body"), 2))
    second = broker.send(HttpRead(2))
    for _ in range(2):
        assert reached.acquire(timeout=PATIENCE)
    if how == "close":
        broker.ask(HttpClose(1))
        broker.ask(HttpClose(2))
        for request in (first, second):
            with pytest.raises(ClosedError):
                broker.wait(request)
    elif how == "gone":
        broker.gone(1)
        with pytest.raises(HandleError):
            broker.ask(HttpRead(1), 2)
        assert not broker.answered(first)
        assert not broker.answered(second)
    else:
        broker.close()
    assert closed.wait(PATIENCE)


def unsent(process: psutil.Process) -> int:
    """Octets that the kernel still has to send for it (`tx_queue` of proc_net(5))."""
    ports = {connection.laddr.port for connection in process.net_connections("tcp")}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    queues = [(int(row[1].rpartition(":")[2], 16), row[4].partition(":")[0]) for row in rows]
    return sum(int(queue, 16) for port, queue in queues if port in ports)


def test_a_closed_stream_that_nobody_reads_leaves_no_connection(
    web: WebServer, broker: Service
) -> None:
    """The server takes nothing, so what was written to it would wait for ever."""
    stop = threading.Event()
    web.routes["/"] = lambda r: stop.wait(PATIENCE)
    broker.grant(egress=[web.place], egress_bytes=1 << 30)
    broker.send(post(web.url("/"), b"", more=True))
    process = psutil.Process(broker.process.pid)
    waits = False
    while not (waits and unsent(process)):
        write = broker.send(HttpWrite(1, bytes(60000), True))
        while not broker.answered(write) and broker.receive(0.5):
            pass
        waits = not broker.answered(write)
    broker.ask(HttpClose(1))
    assert eventually(lambda: process.net_connections("tcp") == [])
    stop.set()


def test_asks_of_a_stream_are_bounded(web: WebServer, broker: Service) -> None:
    stop = threading.Event()
    web.routes["/"] = lambda r: stop.wait(PATIENCE)
    broker.send(post(web.url("/"), b"", more=True))
    reads = [broker.send(HttpRead(1)) for _ in range(65)]
    with pytest.raises(QuotaError, match="http_read"):
        broker.wait(reads[-1])
    stop.set()


def test_a_seat_it_was_not_told_of_and_a_grant_that_is_none(broker: Service) -> None:
    with pytest.raises(UnavailableError):
        broker.ask(get("http://127.0.0.1/"), 5)
    broker.grant(5, egress=["http://what/"])
    with pytest.raises(UnavailableError):
        broker.ask(get("http://127.0.0.1/"), 5)
