"""Recorded answers under the names that the replayed program chose: its request ids, its places."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import msgspec
from inferlet import abi
from inferlet.abi import AnyCommand

from piehost.host.shm import RingWriter
from piehost.wire.recording import ToInferlet

from .errors import HostError
from .frames import answers_of, frame
from .ring_places import Claims, Place, RingPlaces, cut

_encode: Final = msgspec.msgpack.Encoder().encode


class _Pair(NamedTuple):
    """Places in ring out: of a recorded command, and of the one that came for it."""

    recorded: Place
    own: Place


class Answers:
    """What the program may be told: that what it asked has been done."""

    def __init__(self, places: RingPlaces, ring_out: RingWriter) -> None:
        self._places = places
        self._ring_out = ring_out
        self._requests: dict[int, deque[int]] = {}  # of the program, by the recorded ones
        self._claims: Claims[_Pair] = Claims()

    def expect(self, recorded: AnyCommand, came: AnyCommand) -> None:
        """`came` has come, and means the same as `recorded`."""
        if recorded.req is not None and came.req is not None:
            self._requests.setdefault(recorded.req, deque()).append(came.req)
        place, own = self._places.out(recorded), self._places.out(came)
        self._claims.add(recorded, _Pair(place, own) if place and own else None)

    def frames(self, told: ToInferlet) -> bytes:
        """Frames of these answers; what they tell of is in ring out from here on.

        HostError if one answers what nobody asked.
        """
        answers = answers_of(told.body) or []  # a recording holds no others
        for answer in answers:
            recorded = answer[1]
            requests = self._requests.get(recorded)
            if requests is None:
                raise HostError(
                    "the recording is damaged",
                    f"it answers request {recorded}, which nobody made",
                    "record again",
                    "bad_recording",
                )
            answer[1] = requests.popleft()
            if not requests:
                del self._requests[recorded]
            for pair in self._claims.take(recorded):
                if (data := cut(told.ring_out, pair.recorded)) is not None:
                    self._ring_out.write(pair.own[0], data)
        return b"".join(_framed(answers))

    def early(self, told: ToInferlet) -> tuple[ToInferlet, ToInferlet] | None:
        """The answers to what was asked already, and the others; None if there are none of the
        former."""
        known: list[list[Any]] = []
        others: list[list[Any]] = []
        for answer in answers_of(told.body) or []:
            asked = answer[1] in self._requests and all(answer[1] != k[1] for k in known)
            (known if asked else others).append(answer)
        if not known:
            return None
        return (
            ToInferlet(_encode(known), told.ring_out),
            ToInferlet(_encode(others), told.ring_out),
        )


def _framed(answers: list[list[Any]]) -> Iterator[bytes]:
    body = _encode(answers)
    if len(body) > abi.MAX_FRAME_BYTES and len(answers) > 1:  # its own numbers take more room
        middle = len(answers) // 2
        yield from _framed(answers[:middle])
        yield from _framed(answers[middle:])
    else:
        yield frame(body)
