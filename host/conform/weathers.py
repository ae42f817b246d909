"""The weathers there are, by name. All but "limits", "error" and "cut" change nothing that a
program may notice: it has to say the same in all of them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec
from inferlet import abi
from inferlet.abi import Startup

from ..errors import Refused
from ..frames import commands_of, frame
from . import widest
from .faults import Cut, Fault
from .weather import Holding, Weather

_EARS: Final = 0.0005  # seconds between two looks whether an octet was read
_SINGLY: Final = 400  # octets of a frame that come one by one; the rest in one piece
UNKNOWN_KEY: Final = "x-conform"


class Octets(Weather):
    """Answers come one octet at a time; the next when the one before was read."""

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        self._at = 0  # of the first one
        self._timer: asyncio.TimerHandle | None = None

    def from_controller(self, body: bytes) -> None:
        self._frames.append(body)
        if self._timer is None:
            self._go_on()

    def _go_on(self) -> None:
        self._timer = None
        while self._frames and self.ends.has_read_all():
            octets = frame(self._frames[0])
            size = 1 if self._at < _SINGLY else len(octets) - self._at
            piece = octets[self._at : self._at + size]
            self._at += size
            if self._at == len(octets):
                self.ends.tell(self._frames.popleft())
                self._at = 0
            self.ends.to_inferlet(piece)
        if self._frames:
            self._timer = asyncio.get_running_loop().call_later(_EARS, self._go_on)

    def close(self) -> None:
        self._frames.clear()
        if self._timer is not None:
            self._timer.cancel()


class Reordered(Holding):
    """Answers of different queues, and of commands without one, change places; within a queue
    they stay in order (docs/abi.md, section 2)."""

    def __init__(self) -> None:
        super().__init__()
        self._streams: dict[int, tuple[str, int]] = {}  # by request

    def from_inferlet(self, body: bytes) -> None:
        for command in commands_of(body) or []:
            if command.req is not None:
                self._streams[command.req] = stream_of(command)
        super().from_inferlet(body)

    def release(self, held: list[bytes]) -> None:
        streams: dict[tuple[str, int], list[bytes]] = {}
        for body in held:
            for answer in msgspec.msgpack.decode(body, type=list[msgspec.Raw]):
                request = msgspec.msgpack.decode(answer)[1]
                stream = self._streams.get(request, ("", 0))
                streams.setdefault(stream, []).append(bytes(answer))
        answers = [answer for stream in reversed(streams.values()) for answer in stream]
        super().release(
            [msgspec.msgpack.encode(list(map(msgspec.Raw, part))) for part in _frames(answers)]
        )


def stream_of(command: abi.Command) -> tuple[str, int]:
    """Answers with the same one keep their order."""
    queue: int | None = getattr(command, "queue", None)
    return ("queue", queue) if queue is not None else (type(command).__name__, 0)


def _frames(answers: list[bytes]) -> list[list[bytes]]:
    """These encoded answers, divided so that each part fits into a frame."""
    frames: list[list[bytes]] = [[]]
    size = 0
    for answer in answers:
        if frames[-1] and size + len(answer) > abi.MAX_FRAME_BYTES - widest.HEADER:
            frames.append([])
            size = 0
        frames[-1].append(answer)
        size += len(answer)
    return frames


class Wide(Weather):
    """Answers and the start-up block are written in the longest form that msgpack has for each
    value, and whole floats as integers."""

    def startup(self, startup: Startup) -> bytes:
        return widest.encode(msgspec.to_builtins(startup))

    def from_controller(self, body: bytes) -> None:
        answers = [widest.encode(answer) for answer in msgspec.msgpack.decode(body)]
        for part in _frames(answers):
            super().from_controller(widest.array(part))


class UnknownKeys(Weather):
    """The start-up block has keys that nobody knows, and the others in another order."""

    def startup(self, startup: Startup) -> bytes:
        def grow(block: dict[str, Any]) -> dict[str, Any]:
            known = dict(reversed(block.items()))
            strange = {UNKNOWN_KEY: {"a": [1, None, -1.5, b"\x00"]}, f"{UNKNOWN_KEY}-list": [[]]}
            return {UNKNOWN_KEY: 7, **known, **strange}

        block = msgspec.to_builtins(startup)
        block["models"] = [grow(model) for model in block["models"]]
        block["limits"] = {**block["limits"], UNKNOWN_KEY: 1 << 40}
        return msgspec.msgpack.encode(grow(block))


_PLAIN: Final[dict[str, Callable[[], Weather]]] = {
    "plain": Weather,
    "again": Weather,
    "limits": Weather,  # fair, but with quotas that leave nearly nothing
    "octets": Octets,
    "late": Holding,
    "reordered": Reordered,
    "wide": Wide,
    "keys": UnknownKeys,
}


def make(text: str) -> Weather:
    """By its name: one of those above, or "error:OP:N:CODE" (the Nth command with that op that an
    error can be seen of fails with that code), or "cut:N" (the connection ends at frame N).
    Refused if it is none."""
    kind, *numbers = text.split(":")
    try:
        if kind == "error":
            op, count, code = map(int, numbers)
            return Fault(op, count, code)
        if kind == "cut":
            (count,) = map(int, numbers)
            return Cut(count)
        return _PLAIN[text]()
    except (KeyError, ValueError) as error:
        raise Refused(f"there is no weather {text!r}", code="bad_message") from error
