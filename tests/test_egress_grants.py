"""What `--egress` can say, which URLs and addresses it allows, and that nothing goes elsewhere."""

from __future__ import annotations

import asyncio
import re
import socket
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferlet.errors import DeniedError

from piehost.host.egress.addresses import parse_host, special_range
from piehost.host.egress.exchange import exchange
from piehost.host.egress.grants import allows, may_lead_to, parse_grant
from piehost.host.egress.lookup import Lookups
from piehost.host.egress.target import parse_target
from piehost.host.egress_grants import check
from piehost.host.errors import Refused

from .web_server import WebServer


def allowed(grants: str, url: str) -> bool:
    target = parse_target(url)
    parsed = [parse_grant(text) for text in grants.split()]
    return allows(parsed, target.scheme, target.host, target.port)


# grants, what they allow, what they do not
CASES = [
    ("", "", "http://a.b http://1.1.1.1"),
    ("a.b", "http://a.b https://A.B. https://a.b:443 http://a.b:80", "http://x.a.b https://a.b:80"),
    ("a.b", "", "http://a.b:8080 http://b http://aa.b http://a.b.c http://a.b:443"),
    ("a.b:8080", "http://a.b:8080 https://a.b:8080", "http://a.b https://a.b"),
    ("*.a.b", "http://x.a.b http://y.x.a.b", "http://a.b http://xa.b http://a.b.c"),
    ("1.1.1.1", "http://1.1.1.1 https://0x01010101", "http://1.1.1.2 http://one.one"),
    ("1.1.0.0/16:53", "http://1.1.9.9:53", "http://1.1.9.9 http://1.2.0.0:53"),
    ("2606:4700::/32", "http://[2606:4700::1]", "http://[2606:4701::1] http://1.1.1.1"),
    ("[2606:4700::]/32:99", "http://[2606:4700::1]:99", "http://[2606:4700::1]"),
    ("0.0.0.0/0", "http://1.1.1.1", "http://10.1.1.1 http://127.1 http://[2606:4700::1]"),
    ("::/0", "http://[2606:4700::1]", "http://[::1] http://[fd00::1] http://[::ffff:1.1.1.1]"),
    ("8.0.0.0/5", "http://8.8.8.8", "http://10.1.1.1"),
    ("10.0.0.0/8", "http://10.1.1.1", "http://11.1.1.1"),
    ("10.1.0.0/16 a.b", "http://10.1.1.1 http://a.b", "http://10.2.1.1"),
    ("bücher.de", "http://bücher.de http://xn--bcher-kva.de", "http://bucher.de"),
]


@pytest.mark.parametrize(("grants", "yes", "no"), CASES)
def test_grants_allow_what_they_say(grants: str, yes: str, no: str) -> None:
    for url in yes.split():
        assert allowed(grants, url), url
    for url in no.split():
        assert not allowed(grants, url), url


def test_the_table_of_the_docs() -> None:
    page = Path(__file__).resolve().parent.parent / "docs" / "egress-and-store.md"
    rows = re.findall(r"^\| `(.+?)` \| (`.+`) \| (`.+`) \|$", page.read_text(), re.MULTILINE)
    assert len(rows) == 7
    for grant, yes, no in rows:
        for url in re.findall(r"`(.+?)`", yes):
            assert allowed(grant, url), (grant, url)
        for url in re.findall(r"`(.+?)`", no):
            assert not allowed(grant, url), (grant, url)


BAD_GRANTS = [
    *(
        "",
        "*",
        "*.",
        "*.*.b",
        "a.*",
        "a*.b",
        "a b",
        "a..b",
        ".a",
        "-",
        "a:",
        "a:0",
        "a:65536",
        "a:x",
    ),
    *("http://a", "a/", "a/b", "user@a", "[::1", "::1]", "[1.2.3.4]", "[::1]x", "1.2.3", "0x7f.1"),
    *("*.1.2.3.4", "1.2.3.4/33", "1.2.3.4/8", "::1/129", "fe80::1%lo", "a" * 64, "a." * 127 + "b"),
    *("1.2.3.4.5", "a\nb", "a\0", "\ud800", "256.1.1.1"),
]


def test_grants_that_are_none_say_why() -> None:
    for text in BAD_GRANTS:
        with pytest.raises(ValueError, match=r"\w+ \w+"):
            parse_grant(text)


PUBLIC = ["1.1.1.1", "8.8.8.8", "172.15.255.255", "172.32.0.0", "100.128.0.0", "223.255.255.255"]


def test_names_lead_to_public_addresses_or_to_those_granted_themselves() -> None:
    for text in [*PUBLIC, "2606:4700::1111", "2a00:1450::1"]:
        assert may_lead_to([], "http", ip_address(text), 80)
    granted = [parse_grant("10.0.0.1:8080"), parse_grant("a.b:8080")]
    assert may_lead_to(granted, "http", ip_address("10.0.0.1"), 8080)
    assert not may_lead_to(granted, "http", ip_address("10.0.0.1"), 80)
    assert not may_lead_to(granted, "http", ip_address("10.0.0.2"), 8080)
    assert not may_lead_to(granted, "http", ip_address("::ffff:10.0.0.1"), 8080)
    assert not may_lead_to([parse_grant("0.0.0.0/0:8080")], "http", ip_address("10.0.0.1"), 8080)


addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))
# beside random ones, those at the edges of the special ranges
edges = st.sampled_from(
    [
        edge
        for text in [
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "224.0.0.0/3",
            "::1/128",
            "::ffff:0:0/96",
            "64:ff9b::/96",
            "2001::/23",
            "2002::/16",
            "fc00::/7",
            "fe80::/10",
            "ff00::/8",
            "2001:db8::/32",
        ]
        for edge in (ip_network(text)[0], ip_network(text)[-1])
    ]
)


@given(st.one_of(addresses, edges))
def test_what_python_calls_private_is_special(address: object) -> None:
    parsed = ip_address(str(address))
    if parsed.is_private or parsed.is_multicast or parsed.is_reserved or parsed.is_unspecified:
        assert special_range(parsed) is not None


@given(st.ip_addresses(v=4))
def test_every_spelling_of_an_address_is_that_address(address: object) -> None:
    parsed = ip_address(str(address))
    a, b, c, d = parsed.packed
    number = int.from_bytes(parsed.packed, "big")
    for spelling in (
        f"{a}.{b}.{c}.{d}",
        f"{a}.{b}.{c}.{d}.",
        f"{a}.{b}.{c << 8 | d}",
        f"{a}.{b << 16 | c << 8 | d}",
        f"{number}",
        f"{number:#x}",
        f"0{number:o}",
        f"0{a:o}.{b:#X}.{c}.{d}",
    ):
        assert parse_host(spelling) == parsed
        assert socket.inet_aton(spelling.removesuffix(".")) == parsed.packed


networks = st.builds(
    lambda address, length: ip_network((address, length % (address.max_prefixlen + 1)), False),
    st.one_of(addresses, edges),
    st.integers(0, 128),
)
hosts = st.one_of(
    st.sampled_from(["a.b", "x.a.b", "*.a.b", "*.x.a.b", "b", "*.b", "xa.b"]),
    networks.map(lambda n: f"[{n[0]}]/{n.prefixlen}" if n.version == 6 else str(n)),
)
grants = st.builds(lambda host, port: host + port, hosts, st.sampled_from(["", ":80", ":9"]))


@given(grants, grants, st.one_of(addresses, edges), st.data())
def test_a_ceiling_lets_through_only_what_it_allows_itself(
    ceiling: str, grant: str, address: object, data: st.DataObject
) -> None:
    check([grant], [grant])
    try:
        check([grant], [ceiling])
    except Refused:
        return
    wide, narrow = parse_grant(ceiling), parse_grant(grant)
    where: list[object] = ["a.b", "x.a.b", "y.x.a.b", "b", "xa.b", address]
    if narrow.network is not None:
        where += [narrow.network[0], narrow.network[-1]]
    host = data.draw(st.sampled_from(where))
    for scheme, port in (("http", 80), ("https", 443), ("http", 9), ("https", 9)):
        if allows([narrow], scheme, host, port):  # type: ignore[arg-type]
            assert allows([wide], scheme, host, port)  # type: ignore[arg-type]


# --- DNS rebinding ----------------------------------------------------------------------------


def test_the_addresses_that_were_checked_are_those_connected_to() -> None:
    """The name is not looked up again: this one does not even exist."""
    with WebServer() as web:
        web.routes["/"] = lambda r: r.answer(b"here")

        async def fetch() -> bytes:
            target = parse_target(f"http://no-such-name.invalid:{web.port}/")
            addresses = [ip_address("127.0.0.1")]
            async with exchange("GET", target, addresses, {}, None) as response:
                return await response.read()

        assert asyncio.run(fetch()) == b"here"
        assert web.seen[0][2]["Host"] == f"no-such-name.invalid:{web.port}"


def test_a_lookup_gives_allowed_addresses_only() -> None:
    async def look_up(*grants: str) -> list[str]:
        target = parse_target("http://localhost:8080/")
        parsed = [parse_grant(text) for text in grants]
        found = await Lookups().addresses(target, parsed, asyncio.Semaphore(1))
        return [str(address) for address in found]

    assert asyncio.run(look_up("localhost:8080", "127.0.0.1:8080")) == ["127.0.0.1"]
    for grants in [["localhost:8080"], ["localhost:8080", "127.0.0.2:8080"], ["127.0.0.1:8080"]]:
        with pytest.raises(DeniedError):
            asyncio.run(look_up(*grants))
