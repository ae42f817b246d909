"""Rules on the places in the rings that commands name (docs/abi.md, section 8)."""

from __future__ import annotations

from msgspec import Struct

from ..ring_places import ALIGN, Place, RingPlaces, cut
from .faults import queue_in_order
from .runs import Run, Sent, Told
from .verdicts import Verdict


class _Claim(Struct):
    """A place that belongs to the backend until its command is answered, or a later one of its
    queue is."""

    sent: Sent
    place: Place
    octets: bytes | None = None  # that lay there


class _Claims:
    def __init__(self) -> None:
        self._open: list[_Claim] = []

    def add(self, sent: Sent, place: Place, octets: bytes | None = None) -> None:
        self._open.append(_Claim(sent, place, octets))

    def overlapping(self, place: Place) -> list[_Claim]:
        return [c for c in self._open if c.place[0] < sum(place) and place[0] < sum(c.place)]

    def told(self, told: Told) -> None:
        if (answered := told.sent) is None:
            return
        queue = queue_in_order(answered.command)
        self._open = [
            claim
            for claim in self._open
            if claim.sent.number > answered.number
            or (claim.sent is not answered and queue_in_order(claim.sent.command) != queue)
        ]


def out_inside(run: Run, verdict: Verdict) -> None:
    places = RingPlaces(run.startup)
    for sent in run.sent():
        place = places.asked_out(sent.command)
        if place is None:
            continue
        verdict.exercised = True
        if place[0] % ALIGN:
            verdict.breaks(run, sent.where, f"offset {place[0]} is not a multiple of {ALIGN}")
        elif sum(place) > run.startup.limits.ring_bytes:
            verdict.breaks(run, sent.where, _outside(place, run.startup.limits.ring_bytes))


def in_inside(run: Run, verdict: Verdict) -> None:
    places = RingPlaces(run.startup)
    for sent in run.sent():
        place = places.asked_into(sent.command)
        if place is None:
            continue
        verdict.exercised = True
        if sum(place) > run.startup.limits.ring_in_bytes:
            verdict.breaks(run, sent.where, _outside(place, run.startup.limits.ring_in_bytes))


def out_free(run: Run, verdict: Verdict) -> None:
    places, claims = RingPlaces(run.startup), _Claims()
    for step in run.steps:
        if isinstance(step, Told):
            claims.told(step)
        elif isinstance(step, Sent):
            if (place := places.out(step.command)) is None:
                continue
            verdict.exercised = True
            for claim in claims.overlapping(place)[:1]:
                what = f"{_range(place)} of ring out overlap those of command {claim.sent.number}, "
                verdict.breaks(run, step.where, what + "which is not answered yet")
            claims.add(step, place)


def in_still(run: Run, verdict: Verdict) -> None:
    """A change is seen when a later command names the same octets and they are others."""
    places, claims = RingPlaces(run.startup), _Claims()
    for step in run.steps:
        if isinstance(step, Told):
            claims.told(step)
        elif isinstance(step, Sent):
            if (place := places.into(step.command)) is None:
                continue
            verdict.exercised = True
            for claim in claims.overlapping(place):
                if _changed(claim, step):
                    what = f"{_range(claim.place)} of ring in, which command {claim.sent.number} "
                    verdict.breaks(run, step.where, what + "still needs, were written anew")
                    break
            claims.add(step, place, cut(step.ring_in, place))


def _changed(claim: _Claim, later: Sent) -> bool:
    """Whether octets of the claim are others when `later` came."""
    if claim.octets is None:
        return False
    first, end = claim.place[0], sum(claim.place)
    for offset, data in later.ring_in:
        begin, stop = max(first, offset), min(end, offset + len(data))
        if (
            begin < stop
            and claim.octets[begin - first : stop - first] != data[begin - offset : stop - offset]
        ):
            return True
    return False


def _range(place: Place) -> str:
    return f"octets {place[0]} to {sum(place) - 1}"


def _outside(place: Place, size: int) -> str:
    return f"{_range(place)} do not lie in a ring of {size}"
