"""Answers that no controller of ours sends: wrong, cut, damaged, too long. They are errors.

It is built with the address and undefined behaviour sanitizers, which end it at the first wrong
access, and look for leaks at its end.
"""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from . import c_fixtures
from .c_contexts import built as built
from .c_driver import Program, answers, framed
from .c_words import ASK

pytestmark = c_fixtures.needs_gcc
program = c_fixtures.started  # the fixture


HOSTILE = {
    "a flag of several parts": b"\x01\x01\x90",
    "a frame of 65537 octets": b"\x02" + (65537).to_bytes(8, "big"),
    "a frame of 2**64 - 1 octets": b"\x02" + b"\xff" * 8,
    "no body": framed(b""),
    "not an array": framed(b"\x80"),
    "octets after the array": framed(b"\x90\xc0"),
    "an array of 2**32 - 1": framed(b"\xdd\xff\xff\xff\xff"),
    "a map as answer": framed(b"\x91\x80"),
    "a nesting bomb": framed(b"\x91" * 20000),
    "a cut answer": framed(b"\x91\x93\x00\x01"),
    "an unknown request": answers([0, 77, None]),
    "an answer to a nil request": answers([0, None, None]),
    "an unknown status": answers([2, 1, None]),
    "too many fields": answers([0, 1, b"", 5]),
    "an error without hint": answers([1, 1, 5, "why"]),
    "an error with code 0": answers([1, 1, 0, "a", "b"]),
    "an error with a number for words": answers([1, 1, 5, 5, 5]),
    "a str where bin is due": answers([0, 1, "hi"]),
    "a number where bin is due": answers([0, 1, 5]),
    "a bin of 4 GiB": framed(b"\x91\x93\x00\x01\xc6\xff\xff\xff\xff"),
    "a str of 4 GiB": framed(b"\x91\x95\x01\x01\x05\xdb\xff\xff\xff\xff"),
    "tokens of 4 GiB": framed(b"\x91\x93\x00\x01\xdd\xff\xff\xff\xff"),
    "the same answer twice": answers([0, 2, 5], [0, 2, 5], [0, 1, b""]),
    "a negative token": answers([0, 2, -5]),
    "a token of 2**32": answers([0, 2, 2**32]),
    "a float token": answers([0, 2, 1.5]),
    "text among the tokens": answers([0, 3, [5, "x"]]),
    "tokens where one is due": answers([0, 2, [5]]),
}


@pytest.mark.parametrize("frame", HOSTILE.values(), ids=list(HOSTILE))
def test_a_wrong_answer_is_a_final_error(program: Program, frame: bytes) -> None:
    program.do("@1 2", f"@2 {ASK['number']}", f"@3 {ASK['tokens']}", "wait 1")
    program.commands()
    program.peer.sendall(frame)
    assert program.line().startswith("error 1 bad_frame ")
    program.do("5 1", "@4 2")
    assert [program.line().split()[1] for _ in range(2)] == ["1", "1"]
    assert program.end() == 0


# A right answer of each kind, and wrong ones.
GOOD: dict[str, Any] = {
    "number": 5,
    "bytes": b"hello",
    "tokens": [5, 300, 70000],
    "bool": True,
    "text": "c3d4",
    "names": ["one", "", "two" * 20],
    "sampled": [5, -0.5, 3],
    "quotas": {"kv_pages": 5, "cpu_seconds": 1.5},
    "message": [b"hello", "a1"],
    "response": [200, {"content-type": "text/html", "x": ""}],
    "imported": [3, b"meta"],
    "exports": [["one", 1, "a1", 2.5], ["two", 300, "a2", None]],
}
WRONG: dict[str, list[Any]] = {
    "number": [True, "x", b"x", 1.5, -1, 2**32, [5], {}],
    "bytes": ["hi", 5, None, [], [b"x"]],
    "tokens": [5, None, {}, ["x"], [[5]], [5, None], [-1], b"\x05"],
    "bool": [0, 1, None, "x", b"", []],
    "text": [b"x", 5, None, ["x"], {}],
    "names": ["x", 5, None, {}, [5], ["a", b"x"], [["x"]], [None]],
    "sampled": [
        5,
        [],
        [5],
        [5, -0.5],
        [5, -0.5, 0, 0],
        [-5, -0.5, 0],
        [5, "x", 0],
        [5, None, 0],
        [2**32, -0.5, 0],
        [5, -0.5, -1],
    ],
    "quotas": [None, [], 5, {"a": "b"}, {"a": None}, {"a": True}, {5: 5}, {"a": [1]}],
    "message": [b"x", None, [b"x"], [b"x", "y", 5], ["x", "y"], [b"x", b"y"], {"x": "y"}],
    "response": [
        *[200, None, [200], [200, []], [200, {}, 0], [-1, {}], [2**32, {}], ["200", {}]],
        *[[200, {"a": 5}], [200, {5: "a"}], [200, {"a": b"b"}], [200, {"a": None}]],
    ],
    "imported": [5, None, [1], [1, "x"], ["1", b""], [b"", 1], [1, b"", 0], [2**32, b""]],
    "exports": [
        *["n", {}, None, ["n"], [["n", 1, "e"]], [["n", 1, "e", None, 5]], [["n", "1", "e", None]]],
        *[[[b"n", 1, "e", None]], [["n", 1, b"e", None]], [["n", 1, "e", "s"]], [[None] * 4]],
    ],
}
KINDS = pytest.mark.parametrize("kind", list(GOOD))


def answered(program: Program, kind: str, body: bytes) -> str:
    """What a program that waits for an answer of `kind` says to a frame of `body`. It can go on."""
    program.do(f"@1 {ASK[kind]}", "wait 1")
    program.commands()
    program.peer.sendall(framed(body))
    line = program.line()
    program.do("again")
    return line


def body(value: Any) -> bytes:
    return msgspec.msgpack.encode([[0, 1, value]])


def test_every_kind_of_answer_is_here() -> None:
    assert set(GOOD) == set(WRONG) == set(ASK)


@KINDS
def test_an_answer_of_another_kind_is_a_final_error(program: Program, kind: str) -> None:
    for value in WRONG[kind]:
        assert answered(program, kind, body(value)).startswith("error 1 bad_frame "), value
    assert answered(program, kind, body(GOOD[kind])).startswith(f"{kind} ")
    assert program.end() == 0


@KINDS
def test_an_answer_cut_anywhere_is_a_final_error(program: Program, kind: str) -> None:
    whole = body(GOOD[kind])
    for size in range(len(whole)):
        assert answered(program, kind, whole[:size]).startswith("error 1 bad_frame "), size
    assert program.end() == 0


@KINDS
def test_a_promise_of_4_gib_is_a_final_error(program: Program, kind: str) -> None:
    """In place of each octet of the answer: an array, map, str or bin of 2**32 - 1 items."""
    whole = body(GOOD[kind])
    for at in range(len(whole)):
        for type_octet in (0xDD, 0xDF, 0xDB, 0xC6):
            bad = whole[:at] + bytes([type_octet]) + b"\xff" * 4 + whole[at + 1 :]
            line = answered(program, kind, bad)
            # among the octets of a text, or of a float, it promises nothing
            assert line.startswith(("error 1 bad_frame ", f"{kind} ")), (at, type_octet)
            assert at > 4 or line.startswith("error ")
    assert program.end() == 0


@KINDS
def test_damaged_answers_never_cause_a_wrong_access(program: Program, kind: str) -> None:
    rng = random.Random(kind)
    whole = body(GOOD[kind])
    lines = set()
    for _ in range(300):
        bad = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            bad[rng.randrange(len(bad))] = rng.choice([rng.randrange(256), 0xDD, 0xC6, 0x93, 0x80])
        lines.add(answered(program, kind, bytes(bad)).split()[0])
    assert "error" in lines and lines <= {"error", "nil", kind}
    assert program.end() == 0


def test_any_value_in_an_answer_is_read_or_refused(program: Program) -> None:
    """Random values of every shape, to a call of every kind."""
    rng = random.Random(11)

    def value(depth: int) -> Any:
        leaves = [None, True, 5, -3, 2**40, 1.5, "x", "long" * 30, b"", b"\xff" * 9]
        shape = rng.randrange(4 if depth else 2)
        if shape < 2:
            return rng.choice(leaves)
        if shape == 2:
            return [value(depth - 1) for _ in range(rng.randrange(6))]
        return {f"k{i}": value(depth - 1) for i in range(rng.randrange(4))}

    for _ in range(600):
        kind = rng.choice(list(ASK))
        line = answered(program, kind, body(value(3))).split()[0]
        assert line in ("error", "nil", kind)
    assert program.end() == 0


def test_an_answer_is_lost_with_its_connection_but_not_its_memory(program: Program) -> None:
    """Answers never waited for, or forgotten: the leak check at the end sees them."""
    requests = {kind: 10 + i for i, kind in enumerate(GOOD)}
    for kind, request in requests.items():
        program.do(f"@{request} {ASK[kind]}")
    program.do(f"forget {requests['exports']}", "flush")
    assert program.line() == "ok"
    program.peer.sendall(answers(*([0, r, GOOD[kind]] for kind, r in requests.items())))
    program.peer.sendall(framed(b"\x80"))
    program.do(f"wait {requests['names']}")
    assert program.line().startswith("names 3 ")
    assert program.end() == 0
