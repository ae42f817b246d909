"""What bounds the egress broker: octets, time, heads, and servers that do not play by the rules."""

from __future__ import annotations

import functools
import gzip
import random
import socket
import struct
import threading
from collections.abc import Callable

import psutil
import pytest
from inferlet.errors import (
    InferletError,
    QuotaError,
    UnavailableError,
)

from piehost.wire.services import HttpClose, HttpRead, HttpWrite

from . import egress_harness
from .egress_harness import fetch, get, post, read_all, refused
from .service_harness import PATIENCE, Service
from .web_server import Request, WebServer

web, broker = egress_harness.web, egress_harness.broker  # the fixtures


def test_a_body_beyond_the_quota(web: WebServer, broker: Service) -> None:
    def endless(request: Request) -> None:
        request.head()
        while True:
            request.wfile.write(bytes(1 << 16))

    web.routes["/"] = endless
    broker.grant(egress=[web.place], egress_bytes=200000)
    broker.ask(get(web.url("/")))
    with pytest.raises(QuotaError, match="200000"):
        read_all(broker)
    with pytest.raises(QuotaError):
        broker.ask(HttpRead(1))
    assert broker.used == {1: 200000}, "all of it is used up"
    refused(broker, get(web.url("/"), 2), QuotaError)
    broker.grant(egress=[web.place], egress_bytes=200001)
    assert broker.ask(get(web.url("/"), 3))[0] == 200, (
        "what was used stays used, what is new counts"
    )


def test_bodies_sent_count_and_break_off_beyond_the_quota(web: WebServer, broker: Service) -> None:
    bodies: list[bytes | None] = []

    def take(request: Request) -> None:
        try:
            bodies.append(request.body())
        except (OSError, ValueError):
            bodies.append(None)
        request.answer(b"")

    web.routes["/"] = take
    broker.grant(egress=[web.place], egress_bytes=100)
    broker.ask(post(web.url("/"), bytes(60)))
    refused(broker, post(web.url("/"), bytes(41), 2), QuotaError)
    broker.grant(2, egress=[web.place], egress_bytes=100)
    opened = broker.send(post(web.url("/"), bytes(60), more=True), 2)
    broker.ask(HttpWrite(1, bytes(40), True), 2)
    with pytest.raises(QuotaError):
        broker.ask(HttpWrite(1, b"x", False), 2)
    with pytest.raises(QuotaError):
        broker.wait(opened)
    broker.close()
    assert bodies[0] == bytes(60)
    assert bytes(100) not in bodies, "what was not sent in whole is not taken for a whole"


@pytest.mark.parametrize("members", [1, 2000])
def test_a_bomb_costs_what_it_decodes_to(web: WebServer, broker: Service, members: int) -> None:
    bomb = gzip.compress(bytes((1 << 28) // members)) * members
    web.routes["/"] = lambda r: r.answer(bomb, Content_Encoding="gzip")
    broker.grant(egress=[web.place], egress_bytes=2 << 20)
    broker.ask(get(web.url("/")))
    with pytest.raises(QuotaError):
        read_all(broker)
    assert broker.used == {1: 2 << 20}
    assert psutil.Process(broker.process.pid).memory_info().rss < 150 << 20


def test_a_body_that_decodes_to_nothing_costs_what_is_received(
    web: WebServer, broker: Service
) -> None:
    def endless(request: Request) -> None:
        request.head(Content_Encoding="gzip")
        nothing = gzip.compress(b"") * 1000
        while True:
            request.wfile.write(nothing)

    web.routes["/"] = endless
    broker.ask(get(web.url("/")))
    with pytest.raises(QuotaError):
        broker.ask(HttpRead(1))
    assert broker.used == {1: 1 << 20}


def test_a_server_that_dawdles_is_unavailable(web: WebServer, broker: Service) -> None:
    stop = threading.Event()

    def head_by_octets(request: Request) -> None:
        for octet in b"HTTP/1.1 200 OK\r\nX: " + b"y" * 10000:
            request.wfile.write(bytes([octet]))
            if stop.wait(0.05):
                return

    def body_by_octets(request: Request) -> None:
        request.head()
        while not stop.wait(0.05):
            request.wfile.write(b"y")

    def silent(request: Request) -> None:
        stop.wait(PATIENCE)

    web.routes.update({"/head": head_by_octets, "/body": body_by_octets, "/silent": silent})
    broker.grant(egress=[web.place], egress_seconds=0.7)
    for path in ("/head", "/silent"):
        refused(broker, get(web.url(path)), UnavailableError, "longer than 0.7 s")
    broker.ask(get(web.url("/body")))
    with pytest.raises(UnavailableError, match=r"longer than 0.7 s"):
        read_all(broker)
    with pytest.raises(UnavailableError, match=r"longer than 0.7 s"):
        broker.ask(HttpRead(1))
    stop.set()


def test_time_that_the_inferlet_takes_does_not_count(web: WebServer, broker: Service) -> None:
    web.routes["/"] = lambda r: r.answer(r.body())
    pause = threading.Event()
    broker.grant(egress=[web.place], egress_seconds=1.0)
    opened = [broker.send(post(web.url("/"), b"a", stream, more=True)) for stream in (1, 2, 3)]
    for stream in (2, 3):
        broker.ask(HttpWrite(stream, b"b", True))
    broker.ask(HttpWrite(3, b"c", False))
    assert broker.wait(opened[2])[0] == 200
    pause.wait(1.5)  # the first has written nothing, the second a part, the third reads nothing
    broker.ask(HttpWrite(1, b"b", True))
    for stream in (1, 2):
        broker.ask(HttpWrite(stream, b"c", False))
        assert broker.wait(opened[stream - 1])[0] == 200
    assert [broker.ask(HttpRead(stream)) for stream in (1, 2, 3)] == [b"abc"] * 3


def test_a_server_that_takes_no_body_is_unavailable(web: WebServer, broker: Service) -> None:
    stop = threading.Event()
    web.routes["/"] = lambda r: stop.wait(PATIENCE)
    broker.grant(egress=[web.place], egress_seconds=1.0, egress_bytes=1 << 30)
    opened = broker.send(post(web.url("/"), b"", more=True))
    with pytest.raises(UnavailableError, match="longer"):
        for _ in range(1000):  # sooner or later the kernel's buffers are full
            broker.ask(HttpWrite(1, bytes(60000), True))
    with pytest.raises(UnavailableError, match="longer"):
        broker.wait(opened)
    stop.set()


def test_heads_are_bounded(web: WebServer, broker: Service) -> None:
    def head(*fields: bytes) -> Callable[[Request], object]:
        text = b"HTTP/1.1 200 OK\r\n" + b"".join(fields) + b"Content-Length: 0\r\n\r\n"
        return lambda r: r.wfile.write(text)

    def endless(request: Request) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            request.wfile.write(b"X: y\r\n" * 1000)

    def interim(request: Request) -> None:
        while True:
            request.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)

    web.routes["/fits"] = head(*(b"X-%d: %b\r\n" % (i, b"y" * 7000) for i in range(4)))
    web.routes["/one"] = head(b"X: " + b"y" * (1 << 20) + b"\r\n")
    web.routes["/name"] = head(b"X" * (1 << 20) + b": y\r\n")
    web.routes["/large"] = head(*(b"X-%d: %b\r\n" % (i, b"y" * 7000) for i in range(5)))
    web.routes["/many"] = head(*(b"X-%d: y\r\n" % i for i in range(200)))
    web.routes["/status"] = lambda r: r.wfile.write(b"HTTP/1.1 200 " + b"y" * (1 << 20))
    web.routes["/endless"] = endless
    web.routes["/interim"] = interim
    broker.grant(egress=[web.place], egress_seconds=2.0)
    assert fetch(broker, web.url("/fits"))[0] == 200
    for path in ("/one", "/name", "/large", "/many", "/status", "/endless", "/interim"):
        refused(broker, get(web.url(path)), UnavailableError)
    assert psutil.Process(broker.process.pid).memory_info().rss < 200 << 20


def test_a_body_that_breaks_off_or_is_not_what_it_says(web: WebServer, broker: Service) -> None:
    text = b"some text that is long enough to be compressed " * 50

    def cut(request: Request) -> None:
        request.head(Content_Length="1000")
        request.wfile.write(b"half")

    def bad_chunk(request: Request) -> None:
        request.head(Transfer_Encoding="chunked")
        request.wfile.write(b"4\r\nhalf\r\nzz\r\n")

    def reset(request: Request) -> None:
        request.head(Content_Length="1000")
        request.wfile.write(b"half")
        linger = struct.pack("ii", 1, 0)  # closing sends RST
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        request.connection.close()

    def late_bad_chunk(request: Request) -> None:
        request.head(Transfer_Encoding="chunked")
        request.wfile.write(b"4\r\nhalf\r\n")
        read_half.wait(PATIENCE)
        request.wfile.write(b"zz\r\n")
        request.is_closed()
        ended.set()

    web.routes["/cut"] = cut
    web.routes["/chunk"] = bad_chunk
    web.routes["/reset"] = reset
    web.routes["/gzip"] = lambda r: r.answer(b"not gzip", Content_Encoding="gzip")
    web.routes["/half"] = lambda r: r.answer(gzip.compress(text)[:-9], Content_Encoding="gzip")
    for path in ("/cut", "/chunk", "/reset", "/gzip", "/half"):
        with pytest.raises(UnavailableError):
            fetch(broker, web.url(path))
    for waits in (True, False):  # whether the next part is asked for before it turns out bad
        read_half, ended = threading.Event(), threading.Event()
        web.routes["/late"] = late_bad_chunk
        broker.ask(get(web.url("/late")))
        assert broker.ask(HttpRead(1)) == b"half"
        if not waits:
            read_half.set()
            assert ended.wait(PATIENCE)
        read = broker.send(HttpRead(1))
        read_half.set()
        with pytest.raises(UnavailableError, match="breaks off"):  # at once, not when time is up
            broker.wait(read)
        broker.ask(HttpClose(1))
    web.routes["/"] = lambda r: r.answer(b"fine")
    assert fetch(broker, web.url("/"))[2] == b"fine"


def test_servers_that_do_not_speak_http(web: WebServer, broker: Service) -> None:
    for octets in [
        b"",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 999999 No\r\n\r\n",
        bytes(100),
        b"HTTP/1.1 200\r\nX\r\n\r\n",
    ]:
        web.routes["/"] = functools.partial(send_octets, octets)
        refused(broker, get(web.url("/")), UnavailableError)


def send_octets(octets: bytes, request: Request) -> None:
    request.wfile.write(octets)


def test_nobody_listens(broker: Service) -> None:
    broker.grant(2, egress=["127.0.0.1:9"])
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9"):
        broker.ask(get("http://127.0.0.1:9/"), 2)


def test_a_switch_of_protocols_is_not_made(web: WebServer, broker: Service) -> None:
    web.routes["/"] = lambda r: r.wfile.write(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n")
    refused(broker, get(web.url("/")), UnavailableError)


@pytest.mark.parametrize("seed", range(3))
def test_random_octets_from_inferlets_and_servers_end_nothing(
    web: WebServer, broker: Service, seed: int
) -> None:
    rng = random.Random(seed)
    good = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n"

    def scramble(data: bytes) -> bytes:
        octets = bytearray(data)
        for _ in range(rng.randint(0, 4)):
            octets[rng.randrange(len(octets))] = rng.choice([rng.randrange(256), 10, 13, 58])
        return bytes(octets)

    def respond(request: Request) -> None:
        packed = gzip.compress(rng.randbytes(100))
        request.wfile.write(
            scramble(good) + scramble(b"%x\r\n%b\r\n0\r\n\r\n" % (len(packed), packed))
        )

    web.routes["/"] = respond
    broker.grant(egress=[web.place], egress_seconds=2.0)
    for i in range(60):
        url = web.url("/")
        if i % 2:
            url = "".join(rng.choice([c, c, c, c, chr(rng.randrange(0x2FF))]) for c in url)
        try:
            broker.ask(get(url))
            read_all(broker)
        except InferletError:
            pass
        broker.ask(HttpClose(1))
    web.routes["/"] = lambda r: r.answer(b"fine")
    assert fetch(broker, web.url("/"))[2] == b"fine"
