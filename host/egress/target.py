"""What an inferlet asks for, checked: URL and headers, and where a redirect leads (RFC 9110)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from inferlet.abi import MAX_URL_BYTES
from inferlet.errors import ArgumentError, DeniedError, UnavailableError
from yarl import URL

from .addresses import Address, parse_host
from .grants import DEFAULT_PORTS

REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_MAX_HEADER_BYTES: Final = 8190  # one field, as common servers take it
_MAX_HEADERS_BYTES: Final = 32768  # all together
_MAX_SHOWN: Final = 200  # characters of a URL in a message

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
_CONTROL: Final = re.compile(r"[\x00-\x20\x7f]")
_BAD_VALUE: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

# What says how a message is framed and to whom it goes is the broker's to say.
_OURS: Final = frozenset(
    {
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_SECRETS: Final = frozenset({"authorization", "cookie"})  # meant for one origin
_OF_THE_BODY: Final = frozenset(
    {"content-type", "content-encoding", "content-language", "content-location"}
)


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that may be asked for if the grants allow it. `url` names `host` as it is here."""

    url: URL
    scheme: str  # http or https
    host: str | Address
    port: int

    def __str__(self) -> str:
        """For messages to people."""
        text = str(self.url)
        return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."

    @property
    def origin(self) -> tuple[str, str | Address, int]:
        return self.scheme, self.host, self.port


def parse_target(text: str) -> Target:
    """The target of an absolute URL. ArgumentError if it is none that can be asked for."""
    shown = repr(text[:_MAX_SHOWN])
    hint = "http://HOST[:PORT]/PATH or https://..., with other characters written as %XX"
    if len(text.encode()) > MAX_URL_BYTES:
        raise ArgumentError(f"the URL {shown}... has more than {MAX_URL_BYTES} octets", hint)
    if _CONTROL.search(text):
        raise ArgumentError(f"the URL {shown} has a space or a control character in it", hint)
    try:
        url = URL(text)
        if url.scheme not in DEFAULT_PORTS:
            raise ValueError("its scheme is neither http nor https")
        if url.raw_user is not None or url.raw_password is not None:
            raise ValueError("it has a user's name or password; that goes into a header")
        if not url.raw_host or not url.port:
            raise ValueError("it has no host or no port")
        host = parse_host(url.raw_host)
        named = url.with_host(str(host)).with_fragment(None)
    except ValueError as error:
        raise ArgumentError(f"the URL {shown} cannot be asked for: {error}", hint) from None
    return Target(named, url.scheme, host, url.port)


def check_headers(headers: Mapping[str, str]) -> None:
    """ArgumentError if an inferlet may not send these headers."""
    total = 0
    for name, value in headers.items():
        if not _TOKEN.fullmatch(name):
            raise ArgumentError(
                f"{name[:_MAX_SHOWN]!r} is not a header's name", "letters, digits and hyphens"
            )
        if name.lower() in _OURS:
            raise ArgumentError(
                f"the header {name} is the connection's, which the broker makes", "leave it out"
            )
        if _BAD_VALUE.search(value):
            raise ArgumentError(
                f"the header {name} has a control character in its value",
                "one line of text; encode other octets, for example in base64",
            )
        size = len(name) + len(value.encode())
        total += size
        if size > _MAX_HEADER_BYTES or total > _MAX_HEADERS_BYTES:
            raise ArgumentError(
                f"the headers are too long at {name}",
                f"{_MAX_HEADER_BYTES} octets each and {_MAX_HEADERS_BYTES} in all",
            )


def redirected(target: Target, location: str) -> Target:
    """Where a redirect of `target` leads. Whether that is granted is not looked at here.

    UnavailableError if it leads nowhere, DeniedError if it gives up TLS.
    """
    try:
        if _BAD_VALUE.search(location):
            raise ValueError("a URL with a control character in it")
        following = parse_target(str(target.url.join(URL(location))))
    except (ArgumentError, ValueError) as error:
        why = error.message if isinstance(error, ArgumentError) else error
        raise UnavailableError(
            f"{target} redirects to what cannot be asked for: {why}", "ask for another URL"
        ) from None
    if target.scheme == "https" and following.scheme == "http":
        raise DeniedError(
            f"{target} redirects to {following}, which is not encrypted",
            "ask for the http URL itself if it is granted",
        )
    return following


def headers_after(
    headers: Mapping[str, str], *, same_origin: bool, body_dropped: bool
) -> dict[str, str]:
    """What of a request's headers goes along with a redirect."""
    dropped = (frozenset() if same_origin else _SECRETS) | (
        _OF_THE_BODY if body_dropped else frozenset()
    )
    return {name: value for name, value in headers.items() if name.lower() not in dropped}
