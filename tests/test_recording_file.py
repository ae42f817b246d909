"""Recordings that are not as they were written: cut off, damaged, of a later version, made up."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from inferlet import abi
from msgspec import structs

from piehost.host.errors import HostError
from piehost.host.recording import Recorder, Recording
from piehost.wire import client as wire
from piehost.wire.recording import ENTRY, ENTRY_BIN, Head, ToInferlet
from piehost.wire.stats import SeatStats

from . import record_harness
from .host_harness import Server, Terminal, write_program
from .record_harness import COUNT, record, replay

terminal = record_harness.terminal  # the fixture


def rewritten(
    octets: bytes,
    path: Path,
    head: Callable[[Head], Head] = lambda head: head,
    told: Callable[[ToInferlet], ToInferlet] = lambda told: told,
) -> Path:
    """The recording with another start, or with other answers; whole again."""
    path.write_bytes(octets)
    whole = Recording(str(path))
    events = [told(e) if isinstance(e, ToInferlet) else e for e in whole.events()]
    path.unlink()
    recorder = Recorder(str(path))
    recorder.begin(head(whole.head), lambda reason: pytest.fail(reason.what))
    for event in events:
        recorder.add(event)
    recorder.close(wire.Ended(0, 0, None, SeatStats(), None))
    return path


@pytest.fixture(scope="module")
def short(server: Server, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The octets of a recording."""
    folder = tmp_path_factory.mktemp("short")
    program = write_program(folder, "count.py", COUNT)
    record(server.terminal, folder / "run.pie", program)
    return (folder / "run.pie").read_bytes()


def test_a_recording_cut_off_anywhere_is_refused(short: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.pie"
    for size in (*range(40), *range(len(short) - 200, len(short))):
        path.write_bytes(short[:size])
        with pytest.raises(HostError, match="cut off"):
            Recording(str(path))


def test_a_damaged_recording_is_refused_whatever_is_wrong(short: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.pie"
    for at in (*range(400), *range(400, len(short), 97), *range(len(short) - 150, len(short))):
        for flip in (0x01, 0x80):
            path.write_bytes(short[:at] + bytes((short[at] ^ flip,)) + short[at + 1 :])
            with pytest.raises(HostError) as error:
                Recording(str(path))
            assert error.value.reason.code == "bad_recording" and error.value.reason.hint
    path.write_bytes(short + b"x")
    with pytest.raises(HostError, match="damaged"):
        Recording(str(path))


def test_errors_of_the_file_are_told(terminal: Terminal, short: bytes, tmp_path: Path) -> None:
    program = write_program(tmp_path, "count.py", COUNT)
    path = tmp_path / "run.pie"
    done = terminal.run("replay", path, program, check=2)
    assert b"does not exist" in done.stderr
    path.write_bytes(short[: len(short) // 2])
    assert b"is cut off" in replay(terminal, path, program, code=125).stderr
    path.write_bytes(b"hello, world, this is no recording")
    assert b"is no recording" in replay(terminal, path, program, code=125).stderr
    path.write_bytes(short)
    assert b"no program" in replay(terminal, path, tmp_path / "gone.py", code=127).stderr
    done = terminal.run("replay", "--quota", "kv_pages=3", path, program, check=2)
    assert b"cannot be chosen" in done.stderr


def test_a_recording_of_a_later_version_says_so(short: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.pie"
    path.write_bytes(short)
    whole = Recording(str(path))
    fields = msgspec.to_builtins(whole.head)
    fields[1:] = [2, {"not": "what it was"}]
    body = msgspec.msgpack.encode(fields)
    path.write_bytes(ENTRY.pack(ENTRY_BIN, len(body)) + body)
    with pytest.raises(HostError, match="later piehost"):
        Recording(str(path))
    startup = structs.replace(whole.head.startup, abi=abi.ABI_VERSION + 1)
    body = msgspec.msgpack.encode(structs.replace(whole.head, startup=startup))
    path.write_bytes(ENTRY.pack(ENTRY_BIN, len(body)) + body)
    with pytest.raises(HostError, match="under ABI 2"):
        Recording(str(path))


@pytest.mark.parametrize(
    "sizes",
    [
        *({"ring_bytes": size} for size in (-1, 0, 1, mmap.PAGESIZE, 1 << 31, 1 << 63)),
        *({"ring_in_bytes": size} for size in (-4096, (1 << 20) + 1, 1 << 40)),
    ],
    ids=str,
)
def test_rings_that_cannot_be_are_told(
    terminal: Terminal, short: bytes, tmp_path: Path, sizes: dict[str, int]
) -> None:
    program = write_program(tmp_path, "count.py", COUNT)
    path = rewritten(short, tmp_path / "run.pie", lambda head: structs.replace(head, **sizes))
    done = replay(terminal, path, program, code=125)
    assert b"run.pie is damaged\n  why: entry 1 (at octet 0): its ring " in done.stderr
    assert b" has %d octets" % next(iter(sizes.values())) in done.stderr
    assert b"try: record again" in done.stderr and b"internal error" not in done.stderr


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"\xc1", b"\x91", b"\x91\x90", b"\x91\x91\x00", b"\xdd\xff\xff\xff\xff"),
        *(b"\x91\x93\x00\xa1x\xc0", b"\x91\x93\x00\x91\x01\x01", b"\x91\x93\x80\x01\x01"),
        *(b"\x91\x93\x00\x01\xa1\xff", b"\x91" * 5000),
    ],
)
def test_answers_that_are_none_are_told(short: bytes, tmp_path: Path, body: bytes) -> None:
    path = rewritten(
        short, tmp_path / "run.pie", told=lambda told: structs.replace(told, body=body)
    )
    with pytest.raises(HostError, match="no list of answers") as caught:
        Recording(str(path))
    assert caught.value.reason.code == "bad_recording" and caught.value.reason.hint


def test_an_answer_that_is_too_large_for_a_frame_ends_nothing(
    terminal: Terminal, short: bytes, tmp_path: Path
) -> None:
    def large(told: ToInferlet) -> ToInferlet:
        kind, request, *_ = msgspec.msgpack.decode(told.body)[0]
        return structs.replace(
            told, body=msgspec.msgpack.encode([[kind, request, bytes(abi.MAX_FRAME_BYTES)]])
        )

    program = write_program(tmp_path, "count.py", COUNT)
    path = rewritten(short, tmp_path / "run.pie", told=large)
    done = terminal.run("replay", path, program, check=1)
    assert b"bad_frame: the controller sent a frame" in done.stderr, "the program says why it ends"
    assert b"run.pie: the program ended after 1 of " in done.stderr
    assert b"internal error" not in done.stderr and b"piehost/host" not in done.stderr
