"""Frames of the ABI: RFC 23 traffic framing, and what is in them (docs/abi.md, section 2)."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from inferlet.abi import FLAG_LONG, MAX_FRAME_BYTES, AnyCommand, Frame, frame_header

_SHORT_HEADER: Final = 2
_LONG_HEADER: Final = 9

_decode: Final = msgspec.msgpack.Decoder(Frame).decode
_decode_answers: Final = msgspec.msgpack.Decoder(list[list[Any]]).decode
_BAD: Final = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


class BadFraming(Exception):
    """The octets are no frame that the ABI allows."""


def next_frame(data: bytes | bytearray | memoryview, at: int) -> tuple[int, int] | None:
    """(begin, end) of the body of the frame at `at`; None if it has not all arrived.

    BadFraming for flags that are wrong, or a size that is too large.
    """
    have = len(data) - at
    if have < 1:
        return None
    if data[at] == 0:
        if have < _SHORT_HEADER:
            return None
        begin, size = at + _SHORT_HEADER, data[at + 1]
    elif data[at] == FLAG_LONG:
        if have < _LONG_HEADER:
            return None
        begin = at + _LONG_HEADER
        size = int.from_bytes(data[at + 1 : begin], "big")
        if size > MAX_FRAME_BYTES:
            raise BadFraming(f"a frame of {size} octets")
    else:
        raise BadFraming(f"flags 0x{data[at]:02x}")
    return (begin, begin + size) if len(data) >= begin + size else None


def frame(body: bytes) -> bytes:
    """The octets of a frame with that body."""
    return frame_header(len(body)) + body


def commands_of(body: bytes) -> list[AnyCommand] | None:
    """None if it is not what the ABI allows."""
    try:
        commands: list[AnyCommand] = _decode(body)
    except _BAD:
        return None
    return commands


def answers_of(body: bytes) -> list[list[Any]] | None:
    """Each is `[kind, request id, ...]`. None if that is not what they are."""
    try:
        answers: list[list[Any]] = _decode_answers(body)
    except _BAD:
        return None
    whole = all(len(a) > 2 and isinstance(a[0], int) and isinstance(a[1], int) for a in answers)
    return answers if whole else None
