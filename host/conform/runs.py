"""One run as the rules see it: what the program sent and was told, in order, from a recording."""

from __future__ import annotations

from collections import deque
from typing import Any, Final, TypeAlias

import msgspec
from inferlet import abi
from inferlet.abi import AnyCommand, Startup
from msgspec import Struct

from piehost.wire.client import Reason
from piehost.wire.recording import FromInferlet, Garbage, ToInferlet, Written

from ..frames import commands_of
from ..recording import Recording
from ..replay_compare import command_name
from .bad_frames import Fault, find

STUCK: Final = "wall_seconds"  # code of the reason that a run ended for which did not end by itself
_decode_answers: Final = msgspec.msgpack.Decoder(list[list[Any]]).decode


class Sent(Struct):
    """A command."""

    frame: int  # its number, from 1
    number: int  # of the command, from 1
    command: AnyCommand
    ring_in: list[tuple[int, bytes]]  # what lay there when the frame came

    @property
    def where(self) -> str:
        name = command_name(type(self.command))
        return f"frame {self.frame}, command {self.number} ({name})"


class Told(Struct):
    """An answer to `sent`; None if nothing was asked under that request id."""

    request: int
    sent: Sent | None
    error: tuple[int, str, str] | None = None  # code, message, hint


class Bad(Struct):
    """Something that is not what the ABI says; nothing from the program counts after it."""

    frame: int
    fault: Fault


Step: TypeAlias = Sent | Told | Bad


class Run(Struct):
    weather: str
    startup: Startup
    steps: list[Step]
    frames: int  # that the program sent
    cut_off: int  # octets at the end of what it sent that are no whole frame
    code: int  # the exit code, or 128 + signal
    reason: Reason | None  # why it is dead, if it did not end by itself
    messages: list[bytes]
    last_words: str  # the last line of its stderr

    @property
    def kind(self) -> str:
        """Of the weather."""
        return self.weather.partition(":")[0]

    @property
    def code_injected(self) -> int:
        """The code of the error that its weather injects; 0 if none."""
        return int(self.weather.rpartition(":")[2]) if self.kind == "error" else 0

    @property
    def is_whole(self) -> bool:
        """All that it sent, the ABI allows, and nobody ended it for anything."""
        bad = any(isinstance(step, Bad) for step in self.steps)
        return not bad and not self.cut_off and not self.ended_for

    @property
    def ended_for(self) -> str:
        """The code of the reason; empty if it ended by itself."""
        return self.reason.code if self.reason is not None else ""

    @property
    def trouble(self) -> str | None:
        """How it failed as a process; None if it ended by itself, with whatever exit code."""
        if self.reason is None:
            return None
        if self.ended_for == STUCK:
            return "it did not end"
        return self.reason.what if self.ended_for == "signal" else None

    def sent(self) -> list[Sent]:
        return [step for step in self.steps if isinstance(step, Sent)]

    def told(self) -> list[Told]:
        return [step for step in self.steps if isinstance(step, Told)]


def read(weather: str, path: str, reason: Reason | None) -> Run:
    """The run in `weather` that was recorded at `path`. HostError if it was not recorded whole."""
    recording = Recording(path)
    steps: list[Step] = []
    stderr = bytearray()
    asked: dict[int, deque[Sent]] = {}  # by request id; of equal ones the first is answered first
    frames = commands = cut_off = 0
    for event in recording.events():
        match event:
            case FromInferlet(body, ring_in):
                frames += 1
                decoded = commands_of(body)
                if decoded is None:
                    steps.append(Bad(frames, find(body)))
                    break
                for command in decoded:
                    commands += 1
                    sent = Sent(frames, commands, command, ring_in)
                    steps.append(sent)
                    if command.req is not None:
                        asked.setdefault(command.req, deque()).append(sent)
            case ToInferlet(body):
                steps += [_told(answer, asked) for answer in _decode_answers(body)]
            case Garbage(data) if data[0] in (0, abi.FLAG_LONG) and not _too_long(data):
                cut_off = len(data)
            case Garbage(data):
                why = f"a frame begins with the octets {data[:9].hex(' ')}"
                steps.append(Bad(frames + 1, Fault("frame-header", why)))
                break
            case Written(2, data):
                stderr += data
    return Run(
        weather=weather,
        startup=recording.head.startup,
        steps=steps,
        frames=frames,
        cut_off=cut_off,
        code=recording.end.code,
        reason=reason,
        messages=[
            step.command.data
            for step in steps
            if isinstance(step, Sent) and isinstance(step.command, abi.Send)
        ],
        last_words=stderr.decode(errors="replace").strip().rpartition("\n")[2],
    )


def _told(answer: list[Any], asked: dict[int, deque[Sent]]) -> Told:
    kind, request, *rest = answer
    waiting = asked.get(request)
    sent = waiting.popleft() if waiting else None
    if kind == abi.ANSWER_ERROR:
        code, message, hint = rest
        return Told(request, sent, (code, message, hint))
    return Told(request, sent)


def _too_long(data: bytes) -> bool:
    return data[0] == abi.FLAG_LONG and int.from_bytes(data[1:9], "big") > abi.MAX_FRAME_BYTES
