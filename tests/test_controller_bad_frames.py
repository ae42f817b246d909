"""Frames that end the inferlet they came from, and nobody else."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from inferlet import abi

from piehost.wire import control

from . import controller_unharmed
from .controller_process import ControllerProcess
from .controller_programs import setup
from .controller_unharmed import assert_generates

shared, controller = controller_unharmed.shared, controller_unharmed.controller  # the fixtures


good = msgspec.msgpack.encode([[1, None, b"x"]])


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


BAD_FRAMES = {
    "more bit": b"\x01\x01\xc0",
    "command frame": b"\x04\x05READY",
    "reserved bit": b"\x10\x01\xc0",
    "oversize": b"\x02" + (65537).to_bytes(8, "big"),
    "4 GiB": b"\x02" + (1 << 32).to_bytes(8, "big"),
    "2**63": b"\x02\x80" + b"\0" * 7,
    "no msgpack": b"\x00\x02\xc1\xc1",
    "empty body": b"\x00\x00",
    "not an array": b"\x00\x01\xc0",
    "a map": b"\x00\x01\x80",
    "trailing octets": bytes([0, len(good) + 1]) + good + b"\xc0",
    "truncated msgpack": bytes([0, len(good) - 1]) + good[:-1],
    "unknown op": b"\x00\x04\x91\x92\xcc\xfa"[:2] + b"\x91\x92\xcc\xfa",
    "op is a string": b"\x00\x05\x91\x92\xa1a\xc0",
    "depth 60000": b"\x02" + (60001).to_bytes(8, "big") + nested(60000),
    "array header of 2**32-1": b"\x00\x05\xdd\xff\xff\xff\xff",
    "too many commands": abi.frame_header(3 + 4097 * 3) + b"\xdc\x10\x01" + b"\x92\x02\x01" * 4097,
    "text that is no UTF-8": b"\x00\x06\x91\x94\x14\x01\x00\xa1"[:2]
    + b"\x91\x94\x14\x01\x00\xa1\xff",
}


def command(*fields: Any) -> bytes:
    body = msgspec.msgpack.encode([list(fields)])
    return abi.frame_header(len(body)) + body


BAD_FIELDS = {
    "handle 0": command(3, None, 0),
    "handle 2**32": command(3, None, 1 << 32),
    "negative request": command(3, -1, 1),
    "request is a float": command(3, 1.5, 1),
    "span of two": command(17, None, 1, [1, 0], []),
    "NaN temperature": command(19, None, 1, [1, 0], 1, float("nan")),
    "top_p 0": command(19, None, 1, [1, 0], 1, 1.0, 0, 0.0),
    "min_p 2": command(19, None, 1, [1, 0], 1, 1.0, 0, 1.0, 2.0),
    "65 stop tokens": command(19, None, 1, [1, 0], 1, 0.0, 0, 1.0, 0.0, None, [1] * 65),
    "one field too many": command(6, None, 1, 0, 7),
    "a field missing": command(6, None, 1),
    "priority 8": command(6, None, 1, 8),
    "position 2**31": command(16, None, 1, [1, 0], [1], 1 << 31),
    "message over 60,000": command(1, None, b"x" * 60001),
}


@pytest.mark.parametrize("name", [*BAD_FRAMES, *BAD_FIELDS])
def test_a_bad_frame_ends_its_sender_alone(controller: ControllerProcess, name: str) -> None:
    seat, bad = controller.admit()
    _, other = controller.admit()
    bad.put(*setup([1, 2, 3], 32))
    bad.sock.sendall({**BAD_FRAMES, **BAD_FIELDS}[name])
    end = controller.from_host(control.End)
    assert (end.seat, end.code) == (seat, "bad_frame")
    assert end.message and end.hint
    with pytest.raises((EOFError, ConnectionError)):
        bad.wait(1)
    assert_generates(controller, other)


def test_a_frame_cut_at_every_octet_is_waited_for(controller: ControllerProcess) -> None:
    _, slow = controller.admit()
    body = msgspec.msgpack.encode([[20, 7, 0, "w1 w2 " * 100, True]])
    for octet in abi.frame_header(len(body)) + body:
        slow.sock.sendall(bytes([octet]))
    assert slow.wait(7) == [1, 2] * 100


def test_an_inferlet_that_dies_within_a_frame_leaves_nothing(controller: ControllerProcess) -> None:
    seat, dying = controller.admit()
    dying.put(*setup([1, 2, 3], 64))
    dying.sock.sendall(b"\x02\0\0\0\0\0\0\xff\xffxx")
    dying.sock.close()
    controller.release(seat)
    assert_generates(controller)
