"""Where an inferlet may go: `HOST[:PORT]` as `--egress` gives it, parsed and matched.

The CLI and the host check grants with this file, the broker requests; it imports nothing of them.

- A **name** (`api.example.com`) allows that name, `*.example.com` every name below it. Names lead
  to public addresses only.
- An **address** or a **network** (`127.0.0.1`, `[::1]`, `10.1.0.0/16`) allows URLs that name an
  address in it, and lets granted names lead there though it is not public. A network that is wider
  than a special range (`0.0.0.0/0`) allows only the public part of it.
- Without a port, http may use 80 and https 443; with one, both may use that one alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Final

from .addresses import Address, Network, parse_host, special_range

DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_BRACKETED: Final = re.compile(r"\[([0-9A-Fa-f.]*:[0-9A-Fa-f:.]*)\](/[0-9]+)?(?::([0-9]{1,5}))?")
_PLAIN: Final = re.compile(r"([^:/\[\]]+)(/[0-9]+)?(?::([0-9]{1,5}))?")
_MAX_PORT: Final = 65535


@dataclass(frozen=True, slots=True)
class EgressGrant:
    """One of `name` and `network` says where; `port` None means the scheme's own."""

    text: str  # as it was given
    port: int | None
    name: str = ""  # lower case
    below: bool = False  # *.name: the names below it, not itself
    network: Network | None = None


def parse_grant(text: str) -> EgressGrant:
    """The grant that `text` is. ValueError says what is wrong with it and what to write."""
    if "://" in text:
        raise ValueError(f"{text!r} is a URL; a grant is its HOST or HOST:PORT alone")
    if text.count(":") > 1 and "[" not in text:  # IPv6 without a port may go without brackets
        return EgressGrant(text, None, network=_network(text, text))
    found = _BRACKETED.fullmatch(text) or _PLAIN.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not HOST or HOST:PORT; an IPv6 address is [v6]:PORT")
    host, length, port = found[1], found[2], None if found[3] is None else int(found[3])
    if port is not None and not 1 <= port <= _MAX_PORT:
        raise ValueError(f"{text!r}: a port is 1 to {_MAX_PORT}")
    if text.startswith("[") or length:
        return EgressGrant(text, port, network=_network(host + (length or ""), text))
    below = host.startswith("*.")
    name = host[2:] if below else host
    if "*" in name:
        raise ValueError(f"{text!r}: '*' can only stand for first labels, as in *.example.com")
    try:
        parsed = parse_host(name.encode("idna").decode())
    except UnicodeError as error:
        raise ValueError(f"{text!r} is no host name: {error}") from None
    if isinstance(parsed, str):
        return EgressGrant(text, port, name=parsed, below=below)
    if below or str(parsed) != name:
        raise ValueError(f"{text!r}: write the address as {parsed}")
    return EgressGrant(text, port, network=_network(name, text))


def _network(host: str, text: str) -> Network:
    try:
        if "%" in host:
            raise ValueError("a zone is known to one machine only")
        return ip_network(host)
    except ValueError as error:
        raise ValueError(f"{text!r} is neither an address nor a network: {error}") from None


def allows(grants: Iterable[EgressGrant], scheme: str, host: str | Address, port: int) -> bool:
    """Whether a URL with this scheme (http or https), host (`parse_host`) and port is granted.

    For a name that is not the end of it: see `may_lead_to`.
    """
    return any(_reaches(grant, host) and _port_fits(grant, scheme, port) for grant in grants)


def may_lead_to(grants: Iterable[EgressGrant], scheme: str, address: Address, port: int) -> bool:
    """Whether a granted name may resolve to `address`: a public one, or one granted itself."""
    return special_range(address) is None or allows(grants, scheme, address, port)


def _reaches(grant: EgressGrant, host: str | Address) -> bool:
    if isinstance(host, str):
        return _names(grant, host)
    network = grant.network
    if network is None or host not in network:
        return False
    special = special_range(host)
    return special is None or is_within(network, special[1])


def _names(grant: EgressGrant, name: str) -> bool:
    if not grant.name:
        return False
    return name.endswith("." + grant.name) if grant.below else name == grant.name


def is_within(inner: Network, outer: Network) -> bool:
    return inner[0] in outer and inner[-1] in outer


def _port_fits(grant: EgressGrant, scheme: str, port: int) -> bool:
    return port == (DEFAULT_PORTS[scheme] if grant.port is None else grant.port)
