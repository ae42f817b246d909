"""What the controller reads from an inferlet: octets, in portions as they arrive.

`one_input` is what fuzzers call. `python fuzz/frames.py OPTIONS FOLDER` runs it under atheris,
which seeks octets that reach new code; options and folder are libFuzzer's. The tests call it with
octets of hypothesis's making.
"""

from __future__ import annotations

import socket
import sys

import msgspec
from inferlet import abi

from piehost.controller.accounts import Account
from piehost.controller.seat import Seat
from piehost.wire.control import Admit

LIMITS = abi.Limits(**dict.fromkeys(abi.Limits.__struct_fields__, 64))
MOST_PORTIONS = 64
encode = msgspec.msgpack.encode
decode = msgspec.msgpack.Decoder(abi.Frame).decode


def one_input(data: bytes) -> None:
    """The first octet is the length of the portions in which the others arrive. AssertionError if
    they give anything but commands or a FrameError, or if the portions matter."""
    if len(data) < 2:
        return
    octets = data[1 : abi.MAX_FRAME_BYTES]  # at most what one read takes
    frames, error = read([octets])
    bodies, wrong = bodies_of(octets)
    assert len(frames) <= len(bodies)
    if len(frames) < len(bodies):
        assert error is not None, "a whole frame was not read"
    else:
        assert (error is not None) == wrong, "a wrong header is taken, or a right one is not"
    for commands, body in zip(frames, bodies[: len(frames)], strict=True):
        assert len(commands) <= abi.MAX_COMMANDS_PER_FRAME
        again = encode(commands)
        assert again == encode(decode(body)), "it is not what the body says"
        assert encode(decode(again)) == again, "what was read cannot be written"
    step = max(data[0], -(-len(octets) // MOST_PORTIONS))
    portions = [octets[at : at + step] for at in range(0, len(octets), step)]
    in_portions, same = read(portions)
    assert encode(in_portions) == encode(frames), "the portions matter"
    assert same == error


def read(portions: list[bytes]) -> tuple[list[list[abi.AnyCommand]], str | None]:
    """The commands of each frame, and what was wrong behind them. Anything but a FrameError that
    reading raises is raised here."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        seat = Seat(Admit(1, "fuzz", LIMITS), Account(1), theirs, set())
        frames: list[list[abi.AnyCommand]] = []
        for portion in portions:
            ours.sendall(portion)
            frames += seat.read() or []
            if seat.broken is not None:
                assert seat.broken.hint
                return frames, seat.broken.message
        return frames, None


def bodies_of(octets: bytes) -> tuple[list[bytes], bool]:
    """The bodies of whole frames, as far as headers are right; whether one is not."""
    bodies: list[bytes] = []
    while octets:
        if octets[0] not in (0, abi.FLAG_LONG):
            return bodies, True
        head = 2 if octets[0] == 0 else 9
        size = int.from_bytes(octets[1:head], "big")
        if len(octets) < head:
            break
        if size > abi.MAX_FRAME_BYTES:
            return bodies, True
        if len(octets) < head + size:
            break
        bodies.append(octets[head : head + size])
        octets = octets[head + size :]
    return bodies, False


if __name__ == "__main__":
    import atheris

    for function in (bodies_of, Seat.read, Seat._decode_frames, Seat._decode):
        atheris.instrument_func(function)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
