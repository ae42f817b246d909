"""The octets of golden vectors, built from plain lists."""

from __future__ import annotations

import struct
from typing import Any

import msgspec

Vector = dict[str, Any]
U32_MAX = 2**32 - 1


def packed(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


def as_json(value: object) -> object:
    """`value` with bytes as `{"hex": ...}`."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, list):
        return [as_json(v) for v in value]
    if isinstance(value, dict):
        return {key: as_json(v) for key, v in value.items()}
    return value


def framed(body: bytes) -> bytes:
    """One ZMTP message: flags, size (one octet, or eight), body."""
    if len(body) < 256:
        return struct.pack("BB", 0, len(body)) + body
    return struct.pack(">BQ", 2, len(body)) + body


def commands(name: str, *items: list[Any]) -> Vector:
    return {
        "name": name,
        "direction": "to_controller",
        "frame_hex": framed(packed(list(items))).hex(),
        "commands": as_json(list(items)),
    }


def answers(name: str, *items: list[Any]) -> Vector:
    return {
        "name": name,
        "direction": "to_inferlet",
        "frame_hex": framed(packed(list(items))).hex(),
        "answers": as_json(list(items)),
    }


def short(name: str, sent: list[Any], full: list[Any]) -> Vector:
    return {**commands(name, full), "frame_hex": framed(packed([sent])).hex()}


def bad(name: str, why: str, frame: bytes) -> Vector:
    return {"name": name, "direction": "to_controller", "frame_hex": frame.hex(), "why": why}


def bad_body(name: str, why: str, *items: object) -> Vector:
    """A whole frame whose body is the array of `items`."""
    return bad(name, why, framed(packed(list(items))))
