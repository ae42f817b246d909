"""IP addresses: which are not the public internet's, and which one a URL's host spells."""

from __future__ import annotations

import re
import socket
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Final, TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

# The IANA special-purpose registries (RFC 6890) and what RFC 4291 leaves outside 2000::/3. The
# first range that holds an address names it, so the catch-alls come last.
_RANGES: Final[tuple[tuple[str, str], ...]] = (
    ("unspecified", "0.0.0.0/8"),
    ("private", "10.0.0.0/8"),
    ("shared by carrier-grade NAT", "100.64.0.0/10"),
    ("loopback", "127.0.0.0/8"),
    ("link-local", "169.254.0.0/16"),
    ("private", "172.16.0.0/12"),
    ("reserved", "192.0.0.0/24"),
    ("for documentation", "192.0.2.0/24"),
    ("a 6to4 relay", "192.88.99.0/24"),
    ("private", "192.168.0.0/16"),
    ("for benchmarks", "198.18.0.0/15"),
    ("for documentation", "198.51.100.0/24"),
    ("for documentation", "203.0.113.0/24"),
    ("multicast", "224.0.0.0/4"),
    ("reserved", "240.0.0.0/4"),
    ("unspecified", "::/128"),
    ("loopback", "::1/128"),
    ("an IPv4-mapped address", "::ffff:0:0/96"),
    ("an IPv4-compatible address", "::/96"),
    ("behind NAT64", "64:ff9b::/96"),
    ("behind NAT64", "64:ff9b:1::/48"),
    ("reserved", "2001::/23"),
    ("for documentation", "2001:db8::/32"),
    ("a 6to4 address", "2002::/16"),
    ("for documentation", "3fff::/20"),
    ("private", "fc00::/7"),
    ("link-local", "fe80::/10"),
    ("private", "fec0::/10"),
    ("multicast", "ff00::/8"),
    ("reserved", "::/3"),
    ("reserved", "4000::/2"),
    ("reserved", "8000::/1"),
)
_SPECIAL: Final[tuple[tuple[str, Network], ...]] = tuple(
    (kind, ip_network(text)) for kind, text in _RANGES
)
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_MAX_NAME: Final = 253  # RFC 1035, without the final dot


def special_range(address: Address) -> tuple[str, Network] | None:
    """What sort of address it is and the range it is in, unless it is a public one (None)."""
    for kind, network in _SPECIAL:
        if address.version == network.version and address in network:
            return kind, network
    return None


def parse_host(text: str) -> str | Address:
    """A DNS name in lower case without its final dot, or the address that `text` spells.

    `text` is a URL's host in ASCII, IPv6 without brackets. A host whose last label is a number is
    an address in one of the spellings of inet_aton(3), such as 127.1, 0x7f.1 or 2130706433: that is
    how whoever connects to it would read it. ValueError, with a text for people, for anything else.
    """
    host = text.lower()
    if ":" in host:
        if "%" in host:
            raise ValueError(f"the address {text!r} has a zone, which only this machine knows")
        return IPv6Address(host)
    host = host[:-1] if host.endswith(".") else host
    labels = host.split(".")
    if len(host) > _MAX_NAME or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"{text!r} is no host name: letters, digits, '-', '_' and dots make one")
    if not _NUMBER.fullmatch(labels[-1]):
        return host
    try:
        return ip_address(socket.inet_aton(host))
    except OSError:
        raise ValueError(f"{text!r} ends in a number, but is no IPv4 address") from None
