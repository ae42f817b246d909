"""A recording as a script: what is to come from the program and what it is to be told, in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from inferlet.abi import AnyCommand
from msgspec import Struct

from piehost.wire.recording import FromInferlet, Garbage, ToInferlet, Written

from .frames import commands_of
from .recording import Recording
from .replay_compare import describe
from .ring_places import RingPlaces, cut

_SHOWN_OCTETS: Final = 24


class Asked(Struct):
    """A command; `ring_in` is what it refers to there."""

    command: AnyCommand
    ring_in: bytes | None


class Bad(Struct):
    """What the controller ends an inferlet for: octets that are no frame, or no commands."""

    data: bytes


def read_script(recording: Recording, places: RingPlaces) -> Iterator[Asked | Bad | ToInferlet]:
    for event in recording.events():
        match event:
            case FromInferlet(body, ring_in):
                commands = commands_of(body)
                if commands is None:
                    yield Bad(body)
                    return  # nothing counts after it
                for command in commands:
                    place = places.into(command)
                    yield Asked(command, cut(ring_in, place) if place is not None else None)
            case ToInferlet():
                yield event
            case Garbage(data):
                yield Bad(data)
                return
            case Written():
                pass


def in_words(one: Asked | Bad) -> str:
    if isinstance(one, Asked):
        return describe(one.command)
    return f"{len(one.data)} octets that are no commands: {one.data[:_SHOWN_OCTETS].hex(' ')}"
