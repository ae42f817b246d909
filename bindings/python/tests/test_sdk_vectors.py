"""The golden vectors: what this binding writes, reads and refuses, octet by octet."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from inferlet import InferletError, Vocabulary, abi
from inferlet.connection import Connection
from inferlet.errors import BY_CODE
from inferlet.future import Answer
from scripted import vectors
from scripted_controller import take_frame

FOLDER = Path(__file__).parents[2] / "vectors"
FILES = ["commands", "short_commands", "answers", "bad_frames", "vocab_table", "startup"]


def plain(value: Any) -> Any:
    """JSON of a vector with its bin fields as bytes."""
    if isinstance(value, dict):
        if value.keys() == {"hex"}:
            return bytes.fromhex(value["hex"])
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list) else value


def named(name: str) -> Any:
    return pytest.mark.parametrize("vector", vectors(name), ids=lambda v: v["name"])


def test_the_committed_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, FOLDER / "generate.py", tmp_path], check=True)
    for name in FILES:
        assert (tmp_path / f"{name}.json").read_bytes() == (FOLDER / f"{name}.json").read_bytes()


def test_every_op_and_error_code_has_a_vector() -> None:
    ops = {c[0] for v in vectors("commands") for c in v["commands"]}
    assert ops == {c.__struct_config__.tag for c in abi.Command.__subclasses__()} == {*range(1, 52)}
    codes = {a[2] for v in vectors("answers") for a in v["answers"] if a[0] == 1}
    assert codes == set(BY_CODE)


@named("commands")
def test_commands_are_written_exactly(vector: dict[str, Any]) -> None:
    commands = msgspec.convert(plain(vector["commands"]), abi.Frame)
    ours, theirs = socket.socketpair()
    connection = Connection(ours.fileno())
    for command in commands:
        connection.append(command)
    connection.flush()
    ours.shutdown(socket.SHUT_WR)
    written = b"".join(iter(lambda: theirs.recv(1 << 16), b""))
    # no frame leaves while there is nothing to say
    assert written == (bytes.fromhex(vector["frame_hex"]) if commands else b"")
    ours.close(), theirs.close()


@named("short_commands")
def test_short_commands_mean_the_full_ones(vector: dict[str, Any]) -> None:
    body = take_frame(bytearray.fromhex(vector["frame_hex"]))
    assert body is not None
    read = msgspec.msgpack.decode(body, type=abi.Frame)
    assert read == msgspec.convert(plain(vector["commands"]), abi.Frame)


@named("answers")
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_answers_resolve_their_futures(vector: dict[str, Any], piece: int) -> None:
    """Whatever pieces the frame arrives in."""
    ours, theirs = socket.socketpair()
    connection = Connection(ours.fileno())
    answers = plain(vector["answers"])
    futures: dict[int, Answer[Any]] = {}
    for answer in answers:
        connection._next_request = answer[1]
        connection.ask(
            abi.Synchronize(None, 1),
            futures.setdefault(answer[1], Answer(connection, lambda value: value)),
        )
    frame = bytes.fromhex(vector["frame_hex"])
    for at in range(0, len(frame), piece):
        assert not frame[at:] or not all(f.answered for f in futures.values()) or not futures
        theirs.sendall(frame[at : at + piece])
        connection.poll()
    for answer in answers:
        future = futures[answer[1]]
        assert future.done()
        if answer[0] == abi.ANSWER_OK:
            assert future.result() == answer[2]
        else:
            with pytest.raises(BY_CODE[answer[2]]) as caught:
                future.result()
            assert (caught.value.message, caught.value.hint) == (answer[3], answer[4])
    ours.close(), theirs.close()


@named("bad_frames")
def test_bad_frames_are_no_frames(vector: dict[str, Any]) -> None:
    """By the types alone; the headers are the controller's to refuse."""
    frame = bytearray.fromhex(vector["frame_hex"])
    bad_flags = frame[0] not in (0, abi.FLAG_LONG)
    too_long = frame[0] == abi.FLAG_LONG and int.from_bytes(frame[1:9], "big") > 65536
    if bad_flags or too_long:
        return
    body = take_frame(frame)
    assert body is not None
    with pytest.raises((msgspec.DecodeError, UnicodeDecodeError, RecursionError)):
        msgspec.msgpack.decode(body, type=abi.Frame)


@named("vocab_table")
def test_vocabulary_tables(vector: dict[str, Any]) -> None:
    vocabulary = Vocabulary(bytes.fromhex(vector["table_hex"]))
    count = len(vector["pieces"])
    assert [vocabulary[i].hex() for i in range(len(vocabulary))] == vector["pieces"]
    assert [vocabulary.is_control(i) for i in range(count)] == vector["special"]
    for case in vector["detokenize"]:
        assert vocabulary.octets(case["tokens"]).hex() == case["text_hex"]
    for token in (-1, count):
        with pytest.raises(InferletError):
            vocabulary[token]


@named("startup")
def test_startup_blocks(vector: dict[str, Any]) -> None:
    startup = msgspec.msgpack.decode(bytes.fromhex(vector["block_hex"]), type=abi.Startup)
    known = msgspec.to_builtins(startup)
    expected = vector["startup"]
    limits = {k: v for k, v in expected["limits"].items() if k != "new"}
    assert known == {k: v for k, v in expected.items() if k != "later"} | {"limits": limits}


def test_a_frame_that_is_none_ends_the_wait() -> None:
    ours, theirs = socket.socketpair()
    connection = Connection(ours.fileno())
    future = connection.ask(abi.Synchronize(None, 1), Answer(connection, lambda value: value))
    theirs.sendall(b"\x01\x01\x90")
    with pytest.raises(InferletError, match="flags 1"):
        future.result()
    assert not select.select([ours], [], [], 0)[0]
    os.close(ours.detach())
    theirs.close()
