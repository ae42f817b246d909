"""Rules on the places in the rings that commands name (docs/abi.md, section 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from inferlet.abi import AnyCommand
from msgspec import Struct

from ..ring_places import ALIGN, Place, RingPlaces, cut
from .faults import queue_in_order
from .runs import Run, Sent, Told
from .verdicts import Verdict

_PlaceOf: TypeAlias = Callable[[AnyCommand], Place | None]


class _Claim(Struct):
    """A place that belongs to the backend until its command is answered, or a later one of its
    queue is."""

    sent: Sent
    place: Place


def out_inside(run: Run, verdict: Verdict) -> None:
    size = run.startup.limits.ring_bytes
    for sent, place in _asked(run, RingPlaces(run.startup).asked_out, verdict):
        if place[0] % ALIGN:
            verdict.breaks(run, sent.where, f"offset {place[0]} is not a multiple of {ALIGN}")
        elif sum(place) > size:
            verdict.breaks(run, sent.where, _outside(place, size))


def in_inside(run: Run, verdict: Verdict) -> None:
    size = run.startup.limits.ring_in_bytes
    for sent, place in _asked(run, RingPlaces(run.startup).asked_into, verdict):
        if sum(place) > size:
            verdict.breaks(run, sent.where, _outside(place, size))


def _asked(run: Run, place_of: _PlaceOf, verdict: Verdict) -> Iterator[tuple[Sent, Place]]:
    """Commands that name a place, which exercises the rule."""
    for sent in run.sent():
        if (place := place_of(sent.command)) is not None:
            verdict.exercised = True
            yield sent, place


def out_free(run: Run, verdict: Verdict) -> None:
    for sent, place, claims in _claimed(run, RingPlaces(run.startup).out, verdict):
        for claim in claims[:1]:
            what = f"{_range(place)} of ring out overlap those of command {claim.sent.number}, "
            verdict.breaks(run, sent.where, what + "which is not answered yet")


def in_still(run: Run, verdict: Verdict) -> None:
    """A change is seen when a later command names the same octets and they are others."""
    for sent, _, claims in _claimed(run, RingPlaces(run.startup).into, verdict):
        for claim in claims:
            if _changed(claim, sent):
                what = f"{_range(claim.place)} of ring in, which command {claim.sent.number} "
                verdict.breaks(run, sent.where, what + "still needs, were written anew")
                break


def _claimed(
    run: Run, place_of: _PlaceOf, verdict: Verdict
) -> Iterator[tuple[Sent, Place, list[_Claim]]]:
    """Commands that name a place, which exercises the rule; and what claims octets of it."""
    claims: list[_Claim] = []
    for step in run.steps:
        if isinstance(step, Told) and step.sent is not None:
            claims = [claim for claim in claims if not _releases(step.sent, claim.sent)]
        elif isinstance(step, Sent) and (place := place_of(step.command)) is not None:
            verdict.exercised = True
            yield step, place, [c for c in claims if _overlap(c.place, place)]
            claims.append(_Claim(step, place))


def _releases(answered: Sent, claimant: Sent) -> bool:
    """Whether the answer to the one command ends the claim of the other."""
    if claimant is answered:
        return True
    same_queue = queue_in_order(claimant.command) == queue_in_order(answered.command)
    return same_queue and claimant.number <= answered.number


def _overlap(one: Place, other: Place) -> bool:
    return one[0] < sum(other) and other[0] < sum(one)


def _changed(claim: _Claim, later: Sent) -> bool:
    """Whether octets of the claim are others when `later` came."""
    octets = cut(claim.sent.ring_in, claim.place)
    if octets is None:
        return False
    first, end = claim.place[0], sum(claim.place)
    for offset, data in later.ring_in:
        begin, stop = max(first, offset), min(end, offset + len(data))
        if (
            begin < stop
            and octets[begin - first : stop - first] != data[begin - offset : stop - offset]
        ):
            return True
    return False


def _range(place: Place) -> str:
    return f"octets {place[0]} to {sum(place) - 1}"


def _outside(place: Place, size: int) -> str:
    return f"{_range(place)} do not lie in a ring of {size}"
