"""The C binding: golden vectors, behaviour against a scripted controller, hostile answers.

All programs here are built with the address and undefined behaviour sanitizers, which end a program
at the first wrong access, so "exit code 0" says that there was none.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from inferlet import abi, errors

from .c_driver import (
    LIMITS,
    C,
    Program,
    answers,
    framed,
    hexed,
    make,
    startup_block,
)

VECTORS = C.parent / "vectors"

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc")


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    make(C, "all", "drivers")


@pytest.fixture
def program() -> Iterator[Program]:
    with Program() as p:
        assert p.line() == "ok"
        yield p


def vectors(name: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads((VECTORS / f"{name}.json").read_text())
    return loaded


def call(command: list[Any]) -> str:
    """The driver's line for a command of the vectors."""
    op, request, *fields = command

    def words(value: Any, counted: bool = False) -> list[str]:
        if value is None:
            return ["nil"]
        if isinstance(value, bool):
            return [str(int(value))]
        if isinstance(value, dict):
            return [value["hex"] or "-"]
        if isinstance(value, str):
            return [hexed(value.encode())]
        if isinstance(value, list):
            flat = [w for item in value for w in words(item)]
            return [str(len(value)), *flat] if counted else flat
        return [repr(value)]

    arrays = {16: [2, 3], 17: [2, 5], 19: [8]}.get(op, [])
    parts = [words(f, counted=i in arrays) for i, f in enumerate(fields)]
    if op == 16:
        parts[3].insert(0, "at" if isinstance(fields[3], list) else "from")
    line = " ".join([str(op), *(w for part in parts for w in part)])
    return line if request is None else f"@{request} {line}"


# --- golden vectors ------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", vectors("commands"), ids=lambda v: v["name"])
def test_commands_are_encoded_as_in_the_vectors(program: Program, vector: dict[str, Any]) -> None:
    program.do(*map(call, vector["commands"]), "flush")
    assert program.line() == "ok"
    if vector["commands"]:
        assert program.frame().hex() == vector["frame_hex"]
    assert program.end() == 0
    with pytest.raises(EOFError):
        program.frame()  # nothing more; and no frame at all for no command


ASK = {"nil": "19 1 1 0 1 0 0 1 0 nil 0 0", "bytes": "2", "tokens": "20 0 78 1"}


def asked_by(answer: list[Any]) -> str:
    """A call that this answer fits."""
    value = answer[2]
    kind = "bytes" if isinstance(value, dict) else "tokens" if isinstance(value, list) else "nil"
    return f"@{answer[1]} {ASK[kind]}"


def printed(answer: list[Any]) -> str:
    """What the driver prints for it."""
    if answer[0]:
        _, _, code, message, hint = answer
        name = errors.BY_CODE[code].name
        return f"error {code} {name} {hexed(message.encode())} {hexed(hint.encode())}"
    value = answer[2]
    if value is None:
        return "nil -1"
    if isinstance(value, dict):
        return f"bytes {value['hex'] or '-'}"
    if isinstance(value, list):
        return " ".join(["tokens", str(len(value)), *map(str, value)])
    return f"number {value}"


@pytest.mark.parametrize("vector", vectors("answers"), ids=lambda v: v["name"])
def test_answers_are_decoded_as_in_the_vectors(program: Program, vector: dict[str, Any]) -> None:
    given = vector["answers"]
    program.peer.sendall(bytes.fromhex(vector["frame_hex"]))
    # Waited for in another order than they come in.
    program.do(*map(asked_by, given), *(f"wait {a[1]}" for a in reversed(given)))
    assert [program.line() for _ in given] == [printed(a) for a in reversed(given)]
    assert program.end() == 0


@pytest.mark.parametrize("vector", vectors("startup"), ids=lambda v: v["name"])
def test_the_startup_block_is_read_as_in_the_vectors(vector: dict[str, Any]) -> None:
    want = vector["startup"]
    lines = [f"id {want['id']}", f"models {len(want['models'])}"]
    lines += [f"arg {hexed(arg.encode())}" for arg in want["args"]]
    for m in want["models"]:
        template = "(none)" if m["chat_template"] is None else m["chat_template"]
        bos = -1 if m["bos_token"] is None else m["bos_token"]
        numbers = [m[k] for k in ("page_size", "vocab_size", "hidden_size", "max_context")]
        lines += f"model {m['name']}|{m['description']}|{m['architecture']}|{template}".split("\n")
        lines.append(" ".join(map(str, ["numbers", *numbers, bos])))
        lines.append(" ".join(map(str, ["eos", *m["eos_tokens"]])))
        lines.append(" ".join(["traits", *m["traits"]]))
    lines.append(" ".join(map(str, ["limits", *(want["limits"][k] for k in LIMITS)])))
    with Program(block=bytes.fromhex(vector["block_hex"])) as p:
        assert p.line() == "ok"
        p.do("startup")
        assert [p.line() for _ in lines] == lines
        assert p.end() == 0


@pytest.mark.parametrize("vector", vectors("vocab_table"), ids=lambda v: v["name"])
def test_the_vocabulary_is_read_as_in_the_vectors(vector: dict[str, Any]) -> None:
    with Program(vocab=bytes.fromhex(vector["table_hex"])) as p:
        assert p.line() == "ok"
        p.do("vocab")
        entries = zip(vector["special"], vector["pieces"], strict=True)
        want = [f"{int(special)} {piece or '-'}" for special, piece in entries]
        assert [p.line() for _ in want] == want
        assert p.line() == f"count {len(want)}"
        for pair in vector["detokenize"]:
            p.do(" ".join(map(str, ["detokenize", len(pair["tokens"]), *pair["tokens"]])))
            assert p.line() == (pair["text_hex"] or "-")
        assert p.end() == 0


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
        ("20 0 " + "78" * 32769 + " 1", "bad_argument"),
        ("20 0 ff 1", "bad_argument"),
        ("20 0 eda080 1", "bad_argument"),
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
    program.do("@1 2", f"@2 {ASK['nil']}", f"@3 {ASK['tokens']}", "wait 1")
    program.commands()
    program.peer.sendall(frame)
    assert program.line().startswith("error 1 bad_frame ")
    program.do("5 1", "@4 2")
    assert [program.line().split()[1] for _ in range(2)] == ["1", "1"]
    assert program.end() == 0


def test_damaged_answers_never_cause_a_wrong_access() -> None:
    rng = random.Random(7)
    good = answers([0, 1, b"hello"], [0, 2, 5], [0, 3, list(range(90, 200))], [1, 4, 5, "a", "b"])
    for _ in range(60):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            bad[rng.randrange(len(bad))] = rng.choice([rng.randrange(256), 0xDD, 0xC6, 0x93])
        with Program() as p:
            p.do("@1 2", f"@2 {ASK['nil']}", f"@3 {ASK['tokens']}", "@4 5 1", "flush")
            assert [p.line(), p.line()] == ["ok", "ok"]
            p.peer.sendall(bytes(bad))
            p.peer.shutdown(1)
            p.do("wait 1", "wait 2", "wait 3", "wait 4")
            assert p.end() == 0


def test_a_distribution_is_read_from_the_ring() -> None:
    ring = bytearray(4096)
    ring[64:80] = msgspec.Raw(bytes([7, 0, 0, 0, 9, 0, 0, 0]) + b"\x00\x00\x40\x3f\x00\x00\x80\x3e")
    with Program(ring=bytes(ring)) as p:
        assert p.line() == "ok"
        p.do("dist 64 2", "dist 62 2", "dist 4088 2", "dist 4294967292 1", "dist 0 4294967295")
        assert p.line() == "dist 7 0.75 9 0.25"
        assert {p.line().split()[2] for _ in range(4)} == {"bad_argument"}
        assert p.end() == 0


# --- the C side's own tests, and what is made ----------------------------------------------------


def test_make_test_passes() -> None:
    out = make(C, "test")
    assert "all passed" in out


def test_the_library_is_found_by_pkg_config(tmp_path: Path) -> None:
    source = tmp_path / "main.c"
    source.write_text(
        "#include <inferlet.h>\nint main(void) { return pie_init() == PIE_CLOSED ? 0 : 1; }\n"
    )
    flags = (C / "build" / "inferlet.pc").read_text()
    assert "@" not in flags and "libinferlet.a" in os.listdir(C / "build")
    include, library = f"-I{C / 'build'}", f"-L{C / 'build'}"
    binary = tmp_path / "main"
    subprocess.run(
        ["gcc", "-static", include, str(source), library, "-linferlet", "-o", str(binary)],
        check=True,
        timeout=60,
    )
    assert subprocess.run([str(binary)], timeout=20).returncode == 0


def test_the_vectors_name_every_command() -> None:
    ops = {c[0] for v in vectors("commands") for c in v["commands"]}
    assert ops == set(range(1, 21))
