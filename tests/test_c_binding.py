"""The C binding: start-up, frames and answers against a scripted controller, rings.

All programs here are built with the address and undefined behaviour sanitizers, which end a program
at the first wrong access, so "exit code 0" says that there was none.
"""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import msgspec
import pytest
from inferlet import abi

from . import c_fixtures
from .c_driver import Program, answers, framed, startup_block
from .c_words import ASK, call

pytestmark = c_fixtures.needs_gcc
built, program = c_fixtures.built, c_fixtures.started  # the fixtures


# --- start-up ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 5, 60, -1])
def test_a_cut_startup_block_is_an_error(cut: int) -> None:
    with Program(block=startup_block(["a"])[:cut]) as p:
        assert p.line().startswith("error 14 closed ")
        assert p.end() == 0


def test_every_damaged_startup_block_is_an_error_or_read() -> None:
    rng = random.Random(5)
    whole = startup_block(["one", "two"])
    for _ in range(40):
        block = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            block[rng.randrange(len(block))] = rng.randrange(256)
        with Program(block=bytes(block)) as p:
            assert p.line().split()[0] in ("ok", "error")
            p.do("startup")
            assert p.end() == 0


def test_a_damaged_vocabulary_gives_no_wrong_read() -> None:
    table = bytearray(abi.build_vocab_table([b"ab", b"cd", b"ef"], [False] * 3))
    table[16:20] = (2**31).to_bytes(4, "little")  # the second token starts beyond the end
    with Program(vocab=bytes(table)) as p:
        assert p.line() == "ok"
        p.do("detokenize 4 0 1 2 99")
        assert p.line() == b"ef".hex()
        assert p.end() == 0
    table[8:12] = (2**32 - 1).to_bytes(4, "little")  # more tokens than the table has room for
    with Program(vocab=bytes(table)) as p:
        assert p.line().startswith("error 14 ")
        assert p.end() == 0


# --- frames and answers --------------------------------------------------------------------------


def test_calls_leave_in_one_frame_when_the_program_waits(program: Program) -> None:
    program.do("3 1 0", "8 1 1 4", "@9 5 1")
    assert not program.waiting(0.1)
    program.do("wait 9")
    assert program.commands() == [[3, None, 1, 0], [8, None, 1, 1, 4], [5, 9, 1]]
    program.peer.sendall(answers([0, 9, None]))
    assert program.line() == "nil -1"


def test_answers_out_of_order_reach_who_asked(program: Program) -> None:
    program.do("@1 2", f"@2 {ASK['tokens']}", "@3 5 1", "wait 3")
    program.commands()
    program.peer.sendall(answers([0, 2, [5, 6]]) + answers([1, 3, 3, "no", "yes"], [0, 1, b"hi"]))
    assert program.line() == f"error 3 bad_span {b'no'.hex()} {b'yes'.hex()}"
    program.do("ready 1", "wait 1", "wait 2", "wait 2")
    assert [program.line() for _ in range(3)] == ["ready", f"bytes {b'hi'.hex()}", "tokens 2 5 6"]
    assert program.line().startswith("error 2 bad_handle ")  # it is used up


def test_ready_reads_without_waiting(program: Program) -> None:
    program.do("@1 2", "@2 2", "ready 1")
    assert program.line() == "not yet"
    assert program.commands() == [[2, 1], [2, 2]]  # asking sends the outbox
    program.peer.sendall(answers([0, 2, b"b"]))
    program.do("ready 1", "ready 2")
    assert [program.line(), program.line()] == ["not yet", "ready"]


def test_forgotten_answers_are_dropped_and_their_place_is_used_again(program: Program) -> None:
    for i in range(3000):  # three times the table
        program.do(f"@{i} 2", f"forget {i}")
        if i % 500 == 499:
            program.do("flush")
            assert program.line() == "ok"
            program.commands()
            program.peer.sendall(answers(*([0, j, b"x"] for j in range(i - 499, i + 1))))
            program.do(f"@{i + 1} 5 1", f"wait {i + 1}")
            program.commands()
            program.peer.sendall(answers([0, i + 1, None]))
            assert program.line() == "nil -1"
    assert program.end() == 0


def test_too_many_futures_are_refused(program: Program) -> None:
    program.do(*(f"@{i} 2" for i in range(1024)), "@5000 2")
    assert program.line().startswith("error 7 over_quota ")
    program.do("flush")
    assert program.line() == "ok"
    assert len(program.commands()) == 1024


def test_an_answer_may_come_octet_by_octet(program: Program) -> None:
    message = bytes(range(256))
    program.do("@1 2", "@2 5 1", "wait 1")
    program.commands()
    for octet in answers([0, 1, message], [0, 2, None]):
        program.peer.sendall(bytes([octet]))
    assert program.line() == f"bytes {message.hex()}"
    program.do("wait 2")
    assert program.line() == "nil -1"


def test_an_answer_frame_of_the_greatest_size(program: Program) -> None:
    message = os.urandom(65536 - 7)
    frame = answers([0, 1, message])
    assert len(frame) == 9 + 65536
    program.do("@1 2", "@2 2", "wait 1")
    program.commands()
    program.peer.sendall(frame + frame[:9] + frame[9:].replace(b"\x93\x00\x01", b"\x93\x00\x02", 1))
    assert program.line() == f"bytes {message.hex()}"
    program.do("wait 2")
    assert program.line() == f"bytes {message.hex()}"


def test_a_full_outbox_is_cut_between_commands(program: Program) -> None:
    sizes = [30000, 30000, 30000, 5500, 60000, 1]
    program.do(*(f"1 {bytes([i]).hex() * n}" for i, n in enumerate(sizes)), "flush")
    frames = [program.commands() for _ in range(3)]
    assert [[len(c[2]) for c in f] for f in frames] == [[30000, 30000], [30000, 5500], [60000, 1]]
    assert [c[2][0] for f in frames for c in f] == list(range(6))


@pytest.mark.parametrize(("extra", "frames"), [(0, 1), (1, 2)])
def test_a_frame_is_filled_to_its_last_octet(program: Program, extra: int, frames: int) -> None:
    first = 32768
    second = 65536 - 1 - (6 + first) - 6 + extra  # array header; two sends of 6 octets and data
    program.do("1 " + "78" * first, "1 " + "78" * second, "flush")
    got = [program.commands() for _ in range(frames)]
    assert [len(c[2]) for f in got for c in f] == [first, second]
    assert program.end() == 0
    with pytest.raises(EOFError):
        program.frame()


def test_numbers_take_the_smallest_form(program: Program) -> None:
    edges = [2**n + d for n in (4, 5, 7, 8, 15, 16, 31) for d in (-2, -1, 0, 1)]
    refs = [e for e in edges if e < 2**31] + [-e for e in edges if e > 1] + [-(2**32)]
    command = [16, None, 1, [1, 0], refs, 0]
    program.do(call(command), "flush")
    assert program.line() == "ok"
    assert program.frame() == framed(msgspec.msgpack.encode([command]))


def test_a_frame_holds_4096_commands_at_most(program: Program) -> None:
    program.do(*["7 1"] * 5000, "flush")
    assert [len(program.commands()), len(program.commands())] == [4096, 904]


SAMPLE = "19 1 1 0 1 1 0 1 0 nil 0 0 "  # up to the mask


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("1 " + "78" * 60001, "bad_argument"),
        ("5 0", "bad_handle"),
        ("6 1 8", "bad_argument"),
        ("16 1 1 0 1 -1 from 0", "bad_argument"),
        ("16 1 1 0 1 5 from 2147483648", "bad_position"),
        ("16 1 1 0 30000 " + "70000 " * 30000 + "from 0", "bad_argument"),
        ("17 1 1 0 1 1025 " + "1 0 1 " * 1025 + "nil nil nil nil", "bad_argument"),
        ("17 1 1 0 1 0 nil nil nil " + "ff" * 65536, "bad_argument"),
        ("19 1 1 0 1 -0.5 0 1 0 nil 0 0", "bad_argument"),
        ("19 1 1 0 1 nan 0 1 0 nil 0 0", "bad_argument"),
        ("19 1 1 0 1 1 0 1.5 0 nil 0 0", "bad_argument"),
        ("19 1 1 0 1 1 0 1 0 nil 65 " + "3 " * 65 + "0", "bad_argument"),
        (SAMPLE + "nil 1025 " + "5 1.5 " * 1025 + "nil 1 0 0 0 0 0", "bad_argument"),
        (SAMPLE + "nil 1 5 nan nil 1 0 0 0 0 0", "bad_argument"),
        (SAMPLE + "nil 1 -2 1.5 nil 1 0 0 0 0 0", "bad_argument"),
        (SAMPLE + "nil 0 3 -1 0 0 0 0 0", "bad_argument"),
        (SAMPLE + "nil 0 3 nan 0 0 0 0 0", "bad_argument"),
        (SAMPLE + "nil 0 3 1 1e7 0 0 0 0", "bad_argument"),
        (SAMPLE + "nil 0 3 1 0 -inf 0 0 0", "bad_argument"),
        ("20 0 " + "78" * 32769 + " 1", "bad_argument"),
        ("20 0 ff 1", "bad_argument"),
        ("20 0 eda080 1", "bad_argument"),
        ("22 - 78 0", "bad_argument"),
        ("22 74 " + "78" * 60001 + " 0", "bad_argument"),
        ("23 1 " + "74" * 257 + " 0", "bad_argument"),
        ("25 0", "bad_handle"),
        ("26 ff", "bad_argument"),
        ("27 6b " + "78" * 60001, "bad_argument"),
        ("30 " + "6b" * 257 + " -", "bad_argument"),
        ("31 1 - 0", "bad_argument"),
        ("31 1 " + "75" * 8193 + " 0", "bad_argument"),
        ("31 1 75 65 " + " ".join(f"{i:04x} -" for i in range(0x2020, 0x2061)), "bad_argument"),
        ("31 1 75 2 61 78 61 79", "bad_argument"),  # a map has a name once
        ("31 1 75 1 - 78", "bad_argument"),
        ("31 1 75 1 61 ff", "bad_argument"),
        ("32 1 75 " + "78" * 60001 + " 0 0", "bad_argument"),
        ("34 0", "bad_handle"),
        ("36 1 - 257 " + "61 " * 257, "bad_argument"),
        ("36 1 - 1 ff", "bad_argument"),
        ("37 0 78", "bad_handle"),
        ("42 1 6e 0 - nil", "bad_argument"),
        ("42 1 6e 1025 " + "1 0 1 " * 1025 + "- nil", "bad_argument"),
        ("42 1 6e 1 0 0 1 - nil", "bad_handle"),
        ("42 1 6e 1 1 0 1 " + "78" * 60001 + " nil", "bad_argument"),
        ("42 1 6e 1 1 0 1 - 4294967296", "bad_argument"),
        ("44 1 1 -", "bad_argument"),
        ("47 1 1 0 2 0 at 2 5 2147483648", "bad_position"),
        ("49 1 1 1 -1", "bad_argument"),
        ("51 0 1025 " + "61 - " * 1025 + "1", "bad_argument"),
        ("51 0 1 61 ff 1", "bad_argument"),
        ("51 0 1 61 " + "78" * 65600 + " 1", "bad_argument"),
    ],
    ids=lambda v: v[:24],
)
def test_what_would_be_a_bad_frame_is_refused_here(program: Program, line: str, name: str) -> None:
    program.do("7 1", f"@1 {line}", "@2 5 1", "wait 2")
    assert program.line().split()[2] == name
    assert program.commands() == [[7, None, 1], [5, 2, 1]]
    program.peer.sendall(answers([0, 2, None]))
    assert program.line() == "nil -1"


def test_what_was_sent_is_not_lost_at_exit(program: Program) -> None:
    program.do("1 6869", "exit 7")
    assert program.exit_code() == 7
    assert program.commands() == [[1, None, b"hi"]]


def test_the_controllers_end_is_a_final_error(program: Program) -> None:
    program.do("@1 2", "@2 2", "wait 1")
    program.commands()
    program.peer.close()
    program.do("wait 2", "1 78", "@3 5 1", "flush", "ready 2")
    lines = [program.line() for _ in range(6)]
    assert all(line.startswith("error 14 closed ") for line in lines[:5])
    assert lines[5] == "ready"
    assert program.end() == 0


def test_the_controllers_end_in_a_write_is_an_error_and_no_signal(program: Program) -> None:
    program.peer.close()
    program.do(*["1 " + "78" * 60000] * 3, "flush")
    assert program.line().startswith("error 14 closed ")
    program.line()
    program.line()
    assert program.end() == 0


@pytest.mark.parametrize(
    ("plain", "full"),
    [
        ("19 1 1 0 1 0 0 0 0 nil 0 0", "19 1 1 0 1 0 0 1 0 nil 0 0 nil 0 nil 1 0 0 0 0 0"),
        ("19 1 1 0 1 0 0 1 0 nil 0 0 nil 0 nil 0 0 0 0 0 0", "19 1 1 0 1 0 0 1 0 nil 0 0"),
    ],
)
def test_a_zeroed_sampling_parameter_is_off(program: Program, plain: str, full: str) -> None:
    program.do(plain, full, "flush")
    first, second = program.commands()
    assert first == second
    assert first[7] == 1.0 and first[15] == 1.0  # top_p, repetition_penalty


def test_handles_count_up_in_name_spaces_of_their_own(program: Program) -> None:
    """The program below makes two of every kind; the controller sees 1 and 2 of each."""
    program.do("kinds", "flush")
    assert program.line() == "ok"
    made = {3: 2, 8: 3, 13: 3, 23: 2, 31: 2, 32: 2, 36: 2, 44: 3, 48: 3}  # op to its field
    got: dict[str, list[int]] = {}
    names = {3: "queue", 8: "kv", 44: "kv", 13: "emb", 23: "sub", 31: "http", 32: "http"}
    for command in program.commands():
        name = names.get(command[0], str(command[0]))
        got.setdefault(name, []).append(command[made[command[0]]])
    assert got == {n: [1, 2] for n in [*names.values(), "36", "48"]}


def test_names_that_c_cannot_say_are_left_out_of_lists(program: Program) -> None:
    program.do(f"@1 {ASK['names']}", f"@2 {ASK['exports']}", "flush")
    assert program.line() == "ok"
    exports = [["a", 1, "e", None], ["b\0c", 2, "e", None], ["d", 3, "e", 2]]
    program.peer.sendall(answers([0, 1, ["a\0", "b", "\0", "c"]], [0, 2, exports]))
    program.do("wait 1", "wait 2")
    assert program.line() == "names 2 62 63"
    assert program.line() == "exports 2 61 1 65 -1 64 3 65 2"
    assert program.end() == 0


@pytest.mark.parametrize(
    "value", [0, 127, 128, 2**32, -1, -32, -33, -(2**15), -(2**31), -(2**53), 0.1, -1e300]
)
def test_a_number_may_be_of_any_type(program: Program, value: float) -> None:
    narrow = msgspec.msgpack.encode([[0, 2, [5, 0, 0]]]).replace(
        b"\x93\x05\x00", b"\x93\x05\xca?\x20\0\0"
    )
    program.do(f"@1 {ASK['sampled']}", f"@2 {ASK['sampled']}", "flush")
    program.peer.sendall(answers([0, 1, [5, value, 0]]) + framed(narrow))
    program.do("wait 1", "wait 2")
    assert program.line() == "ok"
    assert program.line() == f"sampled 5 {float(value):.17g} 0"
    assert program.line() == "sampled 5 0.625 0"  # a float 32


def test_an_error_this_binding_does_not_know_keeps_its_code(program: Program) -> None:
    program.do("@1 2", "wait 1")
    program.commands()
    program.peer.sendall(answers([1, 1, 99, "later", ""]))
    assert program.line() == f"error 99 error {b'later'.hex()} -"


# --- rings ---------------------------------------------------------------------------------------


def test_a_distribution_is_read_from_the_ring() -> None:
    ring = bytearray(4096)
    ring[64:80] = msgspec.Raw(bytes([7, 0, 0, 0, 9, 0, 0, 0]) + b"\x00\x00\x40\x3f\x00\x00\x80\x3e")
    with Program(ring=bytes(ring)) as p:
        assert p.line() == "ok"
        p.do("dist 64 2", "dist 62 2", "dist 4088 2", "dist 4294967292 1", "dist 0 4294967295")
        assert p.line() == "dist 7 0.75 9 0.25"
        assert {p.line().split()[2] for _ in range(4)} == {"bad_argument"}
        assert p.end() == 0


def test_vectors_are_read_from_ring_out_and_written_to_ring_in() -> None:
    numbers = [1.5, -0.0, 3.4028234663852886e38, 1e-45]
    ring = bytes(8) + struct.pack("<4f", *numbers) + bytes(4096 - 24)
    with Program(ring=ring) as p:
        assert p.line() == "ok"
        p.do("floats 8 4", "floats 4096 0", "floats 6 1", "floats 4092 2", "floats 4294967292 1")
        assert [float(n) for n in p.line().split()[1:]] == pytest.approx(numbers, rel=1e-8)
        assert p.line() == "floats"
        assert {p.line().split()[2] for _ in range(3)} == {"bad_argument"}
        p.do("put_floats 8184 2 0.25 -0.0", "put_floats 8188 2 1 1", "put_floats 2 1 1")
        assert p.line() == "ok"
        assert {p.line().split()[2] for _ in range(2)} == {"bad_argument"}
        assert p.ring_in[8184:] == struct.pack("<2f", 0.25, -0.0)
        assert p.ring_in[:8184] == bytes(8184)
        assert p.end() == 0


def test_a_token_mask_has_a_bit_for_each_token_least_significant_first() -> None:
    with Program() as p:
        assert p.line() == "ok"
        p.ring_in[:] = b"\xff" * len(p.ring_in)  # what lay there before is gone
        p.do("put_token_mask 5 19 4 0 9 18 9", "put_token_mask 100 16 1 16")
        assert p.line() == "ok"
        assert p.ring_in[4:9] == b"\xff\x01\x02\x04\xff"
        assert p.line().split()[2] == "bad_argument"
        assert p.end() == 0


@pytest.mark.parametrize("fds", ["", "4", "5"])
def test_a_program_without_a_ring_starts_and_reads_nothing(fds: str, tmp_path: Path) -> None:
    """Descriptors 4 and 5 are each there or not: the calls say so."""
    given = {int(fd) for fd in fds}
    launcher = ["/bin/sh", "-c", "".join(f"exec {fd}<&-; " for fd in {4, 5} - given) + 'exec "$0"']
    with Program(launcher=launcher) as p:
        assert p.line() == "ok"
        p.do("floats 0 1", "put_floats 0 1 1")
        got = [p.line().split()[0] for _ in range(2)]
        assert got == ["floats" if 4 in given else "error", "ok" if 5 in given else "error"]
        assert p.end() == 0
