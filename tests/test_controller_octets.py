"""Octets nobody meant to send: golden frames, mutated. They hurt their sender alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from inferlet import abi

from piehost.wire import control

from .controller_process import VOCAB, ControllerProcess
from .controller_programs import Q, chain, setup
from .toy_device import greedy

FRAMES, PAGES = 400, 64  # frames a seed
VECTORS = Path(__file__).parent.parent / "bindings" / "vectors"


@pytest.fixture(scope="module")
def shared() -> Iterator[ControllerProcess]:
    process = ControllerProcess(pages=PAGES, chunk=20)
    yield process
    process.close()


def golden_frames() -> list[bytes]:
    frames = []
    for name in ("commands.json", "short_commands.json", "bad_frames.json"):
        for vector in msgspec.json.decode((VECTORS / name).read_bytes()):
            if vector["direction"] == "to_controller":
                frames.append(bytes.fromhex(vector["frame_hex"]))
    return frames


def mutated(frame: bytes, source: random.Random) -> bytes:
    """With some octets changed, left out, doubled or swapped for others; the header mostly fits."""
    body = bytearray(frame[2:] if frame[0] == 0 else frame[9:])
    for _ in range(source.choice([0, 1, 1, 2, 4])):
        at = source.randrange(len(body) + 1)
        match source.randrange(4):
            case 0:
                body[at : at + 1] = source.randbytes(1)
            case 1:
                del body[at : at + source.randrange(1, 4)]
            case 2:
                body[at:at] = body[at : at + source.randrange(1, 9)]
            case _:
                body[at : at + 1] = source.choice(
                    [b"\x01", b"\xc0", b"\x90", b"\xce\xff\xff\xff\xff"]
                )
    if source.random() < 0.05:
        return source.randbytes(2) + bytes(body)
    return abi.frame_header(len(body)) + bytes(body)


@pytest.mark.parametrize("seed", range(4))
def test_no_octets_hurt_the_controller_or_a_neighbour(shared: ControllerProcess, seed: int) -> None:
    source = random.Random(seed)
    frames = golden_frames()
    assert len(frames) > 30
    honest_seat, honest = shared.admit()
    ended = 0
    for turn in range(FRAMES // 20):
        honest.put(*setup([1, 2, 3 + turn], 32), *chain(3, 12, 100, [VOCAB]), abi.Synchronize(1, Q))
        seat, hostile = shared.admit()
        hostile.put(*setup([1, 2, 3], 16), *chain(3, 3, 1 << 20, []))
        try:
            for _ in range(20):
                hostile.sock.sendall(mutated(source.choice(frames), source))
                if source.random() < 0.2:
                    shared.collect()
                    shared.serve(source.randrange(len(shared.waiting) + 1))
        except OSError:
            ended += 1
        shared.wait(honest, 1)
        expected = greedy([1, 2, 3 + turn], 12, VOCAB)
        assert [honest.wait(100 + i) for i in range(12)] == expected
        honest.ask(abi.DestroyQueue(2, Q))
        shared.release(seat)
        assert shared.process.poll() is None
    shared.release(honest_seat)
    assert ended
    while shared.collect():
        shared.serve()
    total = shared.stats().total
    assert (total.pages_free, total.rows_free, total.seats) == (PAGES, 256, 0)


def test_what_came_before_bad_octets_still_counts(shared: ControllerProcess) -> None:
    seat, peer = shared.admit()
    body = msgspec.msgpack.encode([abi.Send(None, b"last words")])
    peer.sock.sendall(abi.frame_header(len(body)) + body + b"\x07garbage")
    while (end := shared.from_host(control.End)).seat != seat:
        pass  # of seats before
    assert end.code == "bad_frame"
    said = [m.data for m in shared.inbox if isinstance(m, control.Sent) and m.seat == seat]
    assert said == [b"last words"]
    shared.release(seat)
