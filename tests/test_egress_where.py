"""Where the egress broker goes, and where it does not: grants, addresses, redirects, TLS."""

from __future__ import annotations

import os
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from inferlet.errors import (
    ArgumentError,
    DeniedError,
    UnavailableError,
)

from piehost.wire.services import HttpClose, HttpOpen

from . import egress_harness
from .egress_harness import fetch, get, post, read_all, refused, to
from .service_harness import Service
from .web_server import Request, WebServer

web, broker = egress_harness.web, egress_harness.broker  # the fixtures


# --- where it goes ----------------------------------------------------------------------------


def test_nothing_is_granted_by_default(web: WebServer, broker: Service) -> None:
    broker.grant(2)
    with pytest.raises(DeniedError, match="not granted") as caught:
        broker.ask(get(web.url("/")), 2)
    assert f"--egress {web.place}" in caught.value.hint
    assert web.seen == []


def test_the_port_counts(web: WebServer, broker: Service) -> None:
    for grants in [["127.0.0.1"], [f"127.0.0.1:{web.port ^ 1}"], ["127.0.0.0/8"]]:
        broker.grant(2, egress=grants)
        with pytest.raises(DeniedError):
            broker.ask(get(web.url("/")), 2)
        broker.ask(HttpClose(1), 2)
    web.routes["/"] = lambda r: r.answer(b"here")
    broker.grant(3, egress=[f"127.0.0.0/8:{web.port}"])
    assert broker.ask(get(web.url("/")), 3)[0] == 200


def test_localhost_is_denied_by_name_and_allowed_with_its_address(
    web: WebServer, broker: Service
) -> None:
    web.routes["/"] = lambda r: r.answer(b"here")
    url = web.url("/", "localhost")
    broker.grant(2, egress=[f"localhost:{web.port}"])
    with pytest.raises(DeniedError, match="loopback"):
        broker.ask(get(url), 2)
    broker.grant(3, egress=[f"localhost:{web.port}", "127.0.0.1"])  # that is ports 80 and 443
    with pytest.raises(DeniedError, match="loopback"):
        broker.ask(get(url), 3)
    with pytest.raises(DeniedError, match="localhost"):  # the address alone: no name is looked up
        broker.ask(get(url), 1)
    assert web.seen == []
    broker.grant(4, egress=[f"localhost:{web.port}", web.place])
    assert broker.ask(get(url), 4)[0] == 200
    assert web.seen[0][2]["Host"] == f"localhost:{web.port}"


SPELLINGS = [
    *("127.1", "127.0.1", "2130706433", "0x7f000001", "0x7F.1", "0177.0.0.1", "017700000001"),
    *("127.0.0.1.", "0x7f.0x0.0x0.0x1", "１２７.0.0.1", "127。0。0。1"),
]


def test_an_address_is_the_same_however_it_is_spelled(web: WebServer, broker: Service) -> None:
    web.routes["/"] = lambda r: r.answer(b"here")
    broker.grant(2, egress=["0.0.0.0/0", "::/0", f"0.0.0.0/0:{web.port}", f"[::]/0:{web.port}"])
    for host in SPELLINGS:
        with pytest.raises(DeniedError):
            broker.ask(get(web.url("/", host)), 2)
        broker.ask(HttpClose(1), 2)
        assert fetch(broker, web.url("/", host))[2] == b"here"
    assert len(web.seen) == len(SPELLINGS)
    assert {headers["Host"] for _, _, headers in web.seen} == {web.place}


PRIVATE = [
    *("0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254"),
    *("172.16.0.1", "172.31.255.255", "192.0.0.1", "192.168.1.1", "198.18.0.1", "224.0.0.1"),
    *("240.0.0.1", "255.255.255.255", "192.88.99.1", "[::]", "[::1]", "[::127.0.0.1]"),
    *("[::ffff:127.0.0.1]", "[::ffff:169.254.169.254]", "[::ffff:8.8.8.8]", "[64:ff9b::a00:1]"),
    *("[64:ff9b:1::1]", "[2002:7f00:1::]", "[2001::1]", "[fc00::1]", "[fd12::1]", "[fe80::1]"),
    *("[fec0::1]", "[ff02::1]", "[100::1]", "[4000::1]"),
]


def test_what_is_not_public_is_denied_though_everything_is_granted(broker: Service) -> None:
    broker.grant(2, egress=["0.0.0.0/0", "::/0"])
    for host in PRIVATE:
        for scheme in ("http", "https"):
            with pytest.raises(DeniedError):
                broker.ask(get(f"{scheme}://{host}/"), 2)
            broker.ask(HttpClose(1), 2)


def test_an_address_of_ipv6_that_is_granted(broker: Service) -> None:
    """Nobody listens there: it is refused by the machine, not by us."""
    broker.grant(2, egress=["[::1]:9", "[::ffff:127.0.0.1]:9", "fe80::/10"])
    for url in ["http://[::1]:9/", "http://[0:0::1]:9/", "http://[::ffff:7f00:1]:9/"]:
        with pytest.raises(UnavailableError):
            broker.ask(get(url), 2)
        broker.ask(HttpClose(1), 2)
    with pytest.raises(DeniedError):
        broker.ask(get("http://127.0.0.1:9/"), 2)


def test_a_name_that_does_not_exist(broker: Service) -> None:
    broker.grant(2, egress=["*.invalid"])
    with pytest.raises(UnavailableError, match="looked up"):
        broker.ask(get("http://no-such-name.invalid/"), 2)


def test_proxies_of_the_environment_are_not_used(web: WebServer) -> None:
    web.routes["/"] = lambda r: r.answer(b"direct")
    proxy = dict.fromkeys(("http_proxy", "HTTP_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    with Service("piehost.host.egress", env={**proxy, "no_proxy": ""}) as broker:
        broker.grant(egress=[web.place])
        assert fetch(broker, web.url("/"))[2] == b"direct"


def test_connections_are_not_used_twice(web: WebServer, broker: Service) -> None:
    ports: list[int] = []

    def note(request: Request) -> None:
        ports.append(request.client_address[1])
        request.close_connection = False
        request.answer(b"")

    web.routes["/"] = note
    for _ in range(3):
        fetch(broker, web.url("/"))
    assert len(set(ports)) == 3


# --- what is no request -----------------------------------------------------------------------


BAD_URLS = [
    *("ftp://127.0.0.1/", "file:///etc/passwd", "gopher://127.0.0.1/", "127.0.0.1", ""),
    *(
        "http://",
        "http:///x",
        "http://:80/",
        "//127.0.0.1/",
        "http://[::1",
        "http://[fe80::1%25lo]/",
    ),
    *("http://a..b/", "http://a b/", "http://%31.0.0.1/", "http://1.2.3.4.5/", "http://256.1/"),
    *("http://h:0/", "http://h:99999/", "http://h:x/", "http://user@h/", "http://u:p@h/"),
    *(
        "http://h\\@evil/",
        "http://h/\r\nX: y",
        "http://h/\0",
        "http://h\n/",
        "http://" + "a" * 64,
    ),
    *("http://h/ HTTP/1.1", "http://" + "a." * 130 + "b/", "http://h/" + "x" * 9000),
    *("\ud7ff\U0010ffff", "http://\u200b/", "http://\uff0e\uff0e/"),
]


def test_urls_that_cannot_be_asked_for(broker: Service) -> None:
    broker.grant(2, egress=["h", "*.b", "127.0.0.1"])
    for url in BAD_URLS:
        with pytest.raises(ArgumentError) as caught:
            broker.ask(get(url), 2)
        assert caught.value.hint
        broker.ask(HttpClose(1), 2)


BAD_HEADERS = [
    *(("X", "a\r\nY: b"), ("X", "a\nb"), ("X", "a\0"), ("X\r\nY", "b"), ("X Y", "b")),
    *(("", "b"), ("X:", "b"), ("Ä", "b"), ("X", "b" * 9000), ("X", "\x7f")),
    *((name, "1") for name in ("Host", "content-LENGTH", "Transfer-Encoding", "Connection")),
    *((name, "1") for name in ("Upgrade", "TE", "Expect", "Keep-Alive", "Proxy-Authorization")),
]


def test_headers_that_cannot_be_sent(web: WebServer, broker: Service) -> None:
    for name, value in BAD_HEADERS:
        call = HttpOpen(1, "GET", web.url("/"), b"", {name: value}, False)
        refused(broker, call, ArgumentError)
    assert web.seen == []


def test_other_methods_and_too_many_octets_of_headers(web: WebServer, broker: Service) -> None:
    refused(broker, HttpOpen(1, "DELETE", web.url("/"), b"", {}, False), ArgumentError, "neither")
    many = {f"X-{i}": "y" * 1000 for i in range(60)}
    refused(broker, HttpOpen(1, "GET", web.url("/"), b"", many, False), ArgumentError, "too long")
    assert web.seen == []


# --- redirects --------------------------------------------------------------------------------


def test_five_redirects_are_followed_and_no_more(web: WebServer, broker: Service) -> None:
    for i in range(6):
        web.routes[f"/{i}"] = to(f"{i + 1}")
    web.routes["/6"] = lambda r: r.answer(b"there")
    assert fetch(broker, web.url("/1"))[::2] == (200, b"there")
    refused(broker, get(web.url("/0")), UnavailableError, "more than 5")
    web.routes["/loop"] = to("/loop", 301)
    refused(broker, get(web.url("/loop")), UnavailableError, "more than 5")


BAD_REDIRECTS = [
    ("http://169.254.169.254/latest/meta-data", DeniedError),
    ("http://[::ffff:169.254.169.254]/", DeniedError),
    ("http://0xa9fea9fe/", DeniedError),
    ("http://example.com/", DeniedError),
    ("//127.0.0.1:9/", DeniedError),
    ("http://localhost:{port}/", DeniedError),
    ("http://127.0.0.1/", DeniedError),
    ("file:///etc/passwd", UnavailableError),
    ("http://user:pw@127.0.0.1:{port}/", UnavailableError),
    ("http://[", UnavailableError),
    ("javascript:alert(1)", UnavailableError),
    ("http://127.0.0.1:{port}/\x01", UnavailableError),
    ("/" + "x" * 9000, UnavailableError),
]


def test_redirects_are_checked_as_requests_are(web: WebServer, broker: Service) -> None:
    for location, kind in BAD_REDIRECTS:
        web.routes["/"] = to(location.format(port=web.port))
        refused(broker, get(web.url("/?" + "?" * 100)), kind)
    assert len(web.seen) == len(BAD_REDIRECTS), "none was followed"


@pytest.mark.parametrize(
    ("status", "method"), [(301, "GET"), (302, "GET"), (303, "GET"), (307, "POST"), (308, "POST")]
)
def test_methods_over_redirects(web: WebServer, broker: Service, status: int, method: str) -> None:
    web.routes["/from"] = to("/to", status)
    web.routes["/to"] = lambda r: r.answer(r.body())
    headers = {"Content-Type": "text/plain", "X-Kept": "1"}
    broker.ask(HttpOpen(1, "POST", web.url("/from"), b"body", headers, False))
    assert read_all(broker) == (b"body" if method == "POST" else b"")
    assert (web.seen[1][0], web.seen[1][2]["X-Kept"]) == (method, "1")
    assert (web.seen[1][2].get("Content-Type") == "text/plain") == (method == "POST")
    assert fetch(broker, web.url("/from"))[0] == 200
    assert web.seen[-1][0] == "GET"


def test_a_body_being_written_is_not_sent_again(web: WebServer, broker: Service) -> None:
    def moved(request: Request) -> None:
        request.answer(b"", 307, Location="/to")

    web.routes["/from"] = moved
    web.routes["/see"] = lambda r: r.answer(b"", 303, Location="/to")
    web.routes["/to"] = lambda r: r.answer(b"seen")
    refused(broker, post(web.url("/from"), b"x", more=True), UnavailableError, "sent again")
    assert broker.ask(post(web.url("/see"), b"x", more=True))[0] == 200
    assert read_all(broker) == b"seen"
    assert web.seen[-1][0] == "GET"


def test_secrets_stay_with_their_origin(web: WebServer, broker: Service) -> None:
    secret = {"Authorization": "Bearer x", "Cookie": "a=b", "X_Kept": "1"}
    with WebServer() as other:
        broker.grant(egress=[web.place, other.place])
        web.routes["/same"] = to(web.url("/to"))
        web.routes["/other"] = to(other.url("/to"))
        for server in (web, other):
            server.routes["/to"] = lambda r: r.answer(b"")
        fetch(broker, web.url("/same"), **secret)
        assert {"Authorization", "Cookie", "X-Kept"} <= web.seen[-1][2].keys()
        fetch(broker, web.url("/other"), **secret)
        assert "X-Kept" in other.seen[-1][2]
        assert not {"Authorization", "Cookie"} & other.seen[-1][2].keys()


# --- TLS --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1, signed by itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    pair = folder / "cert.pem", folder / "key.pem"
    made = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext"
    try:
        subprocess.run(
            [*made.split(), "subjectAltName=IP:127.0.0.1", "-out", pair[0], "-keyout", pair[1]],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("there is no openssl to make a certificate with")
    return pair


@pytest.fixture
def secure(certificate: tuple[Path, Path]) -> Iterator[WebServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with WebServer(context) as server:
        server.routes["/"] = lambda r: r.answer(b"secret")
        yield server


def test_a_certificate_that_nobody_trusts(secure: WebServer, broker: Service) -> None:
    broker.grant(egress=[secure.place])
    assert "certificate" in refused(broker, get(secure.url("/")), UnavailableError)
    assert secure.seen == []


def test_a_certificate_that_the_system_trusts(
    web: WebServer, secure: WebServer, certificate: tuple[Path, Path]
) -> None:
    with Service("piehost.host.egress", env={"SSL_CERT_FILE": os.fspath(certificate[0])}) as broker:
        broker.grant(egress=[web.place, secure.place, f"localhost:{secure.port}"])
        assert fetch(broker, secure.url("/"))[2] == b"secret"
        wrong_name = secure.url("/", "localhost")
        assert "localhost" in refused(broker, get(wrong_name), UnavailableError)
        secure.routes["/down"] = to(web.url("/"))
        refused(broker, get(secure.url("/down")), DeniedError, "not encrypted")
        web.routes["/up"] = to(secure.url("/"))
        assert fetch(broker, web.url("/up"))[2] == b"secret"
