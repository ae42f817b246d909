"""A recorded run: what one inferlet was started with, and all that went over its descriptors.

The file is a run of msgpack bins of the 32-bit form (octet c6, then the size in four octets, most
significant first), so that a reader finds the next one without understanding this one. Each holds
one msgpack struct: `Head` first, then events in the order they happened at the host's end of the
connection, `End` last. A file without `End` was cut off.
"""

from __future__ import annotations

import struct
from typing import Final, TypeAlias

from inferlet.abi import Startup
from msgspec import Struct

RECORDING_VERSION: Final = 1
HEAD_TAG: Final = "head"
ENTRY: Final = struct.Struct(">BI")  # what precedes each struct: ENTRY_BIN, its size
ENTRY_BIN: Final = 0xC6


class Head(Struct, array_like=True, tag=HEAD_TAG):
    version: int
    program: str  # its name, for people
    kind: str  # profile it ran under, for people
    startup: Startup
    vocabulary: bytes  # the table of fd 7
    ring_bytes: int
    ring_in_bytes: int
    began: float = 0.0  # Unix time; what the deadline of `startup` is relative to


class FromInferlet(Struct, array_like=True, tag="in"):
    """One frame's body as it was read; not checked."""

    body: bytes
    # (offset, octets) of ring in that its commands refer to, as they were when it arrived;
    # ascending, apart from each other
    ring_in: list[tuple[int, bytes]] = []


class ToInferlet(Struct, array_like=True, tag="out"):
    """One frame's body as it was written."""

    body: bytes
    # (offset, octets) that its answers refer to; ascending, apart from each other
    ring_out: list[tuple[int, bytes]] = []


class Garbage(Struct, array_like=True, tag="garbage"):
    """Octets from the inferlet that are no frame; nothing from it counts after them."""

    data: bytes


class Written(Struct, array_like=True, tag="written"):
    """Output of the process: stream 1 or 2."""

    stream: int
    data: bytes


class End(Struct, array_like=True, tag="end"):
    code: int  # as `piehost launch` exits
    reason: str  # code of the reason it was ended for; empty if it ended by itself
    # CRC-32 of all octets of the file before this entry, then of this struct with a 0 here
    checksum: int = 0


Event: TypeAlias = Head | FromInferlet | ToInferlet | Garbage | Written | End
