"""What inferlets ask of the host's services: the store, the web, children.

The controller sends these to the host inside `control.Ask`; the host carries out `Spawn`,
`EndChild` and `Quota` itself, and passes the others on to the store's and the egress broker's
processes inside `ServiceAsk`. What is left out of the ABI's commands (handles checked, names
bounded) the controller has done. `stream` and `child` are numbers of the controller's that stand
for the inferlet's handles; it never uses one twice.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from msgspec import Struct


class StoreGet(Struct, array_like=True, tag="store_get"):
    key: str


class StoreSet(Struct, array_like=True, tag="store_set"):
    key: str
    value: bytes


class StoreDelete(Struct, array_like=True, tag="store_delete"):
    key: str


class StoreExists(Struct, array_like=True, tag="store_exists"):
    key: str


class StoreList(Struct, array_like=True, tag="store_list"):
    prefix: str
    after: str


class StoreUsed(Struct, array_like=True, tag="store_used"):
    """Answered with the octets that the user's keys and values take."""


class HttpOpen(Struct, array_like=True, tag="http_open"):
    """Answered with `[status, headers]`."""

    stream: int
    method: str  # GET or POST
    url: str
    body: bytes
    headers: dict[str, str]
    more: bool  # `HttpWrite`s follow


class HttpWrite(Struct, array_like=True, tag="http_write"):
    stream: int
    data: bytes
    more: bool


class HttpRead(Struct, array_like=True, tag="http_read"):
    stream: int


class HttpClose(Struct, array_like=True, tag="http_close"):
    stream: int


class Spawn(Struct, array_like=True, tag="spawn"):
    child: int
    program: str
    args: list[str]


class EndChild(Struct, array_like=True, tag="end_child"):
    """Answered at once; `control.ChildEnded` follows when it is dead."""

    child: int


class Quota(Struct, array_like=True, tag="quota"):
    """`left` is what the controller knows; the answer adds what the host does."""

    left: dict[str, float]


StoreCall: TypeAlias = StoreGet | StoreSet | StoreDelete | StoreExists | StoreList | StoreUsed
HttpCall: TypeAlias = HttpOpen | HttpWrite | HttpRead | HttpClose
Call: TypeAlias = StoreCall | HttpCall | Spawn | EndChild | Quota


# --- host and the processes of the store and the egress broker ----------------------------------


class Grant(Struct, array_like=True, tag="grant"):
    """To the broker, before a seat's first call: where it may go. To the store: its user."""

    seat: int
    user: str
    egress: list[str]  # HOST[:PORT]; HOST is a name, *.name, an address or a network in CIDR
    store_bytes: int
    egress_bytes: int  # both ways, bodies only
    egress_seconds: float  # a request may take, until its last octet


class ServiceAsk(Struct, array_like=True, tag="ask"):
    seat: int
    request: int
    call: StoreCall | HttpCall


class Gone(Struct, array_like=True, tag="gone"):
    """The seat is released: its streams are closed, what it asked is not answered any more. The
    process sends it back behind the last that it says of the seat."""

    seat: int


class ServiceReply(Struct, array_like=True, tag="reply"):
    request: int
    value: Any = None
    error: tuple[int, str, str] | None = None  # code of the ABI, message, hint


class EgressUsed(Struct, array_like=True, tag="egress_used"):
    """From the broker, after each part of a body: what the seat has used since the last one."""

    seat: int
    octets: int


HostToService: TypeAlias = Grant | ServiceAsk | Gone
ServiceToHost: TypeAlias = ServiceReply | EgressUsed | Gone
