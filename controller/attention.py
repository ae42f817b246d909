"""How much of the controller an inferlet may have while the accelerator works for others.

Whoever only asks, and reads no answer, pays for it with next to nothing of its own: neither its
share of the processors nor its socket holds it up, and what it asks for is done with the server's
weight. So its time is a bucket, which counts only against others: alone, it has all.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from .rates import Bucket

if TYPE_CHECKING:
    from .batcher import Batcher
    from .seat import Seat

# Of each processor of the machine, which the accelerator may be, too. At most half the controller.
_OF_A_PROCESSOR: Final = 1 / 64
_MOST: Final = 0.5
_SLICE_US: Final = 1000  # worth going on for
_LOOK_SECONDS: Final = 0.05  # whether it is alone now


def full(now: float) -> Bucket:
    """A new inferlet's, in microseconds of the controller. `now`: seconds, monotonic."""
    share = min(_MOST, len(os.sched_getaffinity(0)) * _OF_A_PROCESSOR)
    return Bucket(int(share * 1e6), now)


class Attention:
    """`held`: those who have had theirs, and when to look again."""

    def __init__(self, batcher: Batcher) -> None:
        self.held: dict[Seat, float] = {}
        self._batcher = batcher

    def holds(self, seat: Seat, now: float) -> bool:
        """Whether it is to wait, with what it says unread."""
        wait = seat.attention.wait(_SLICE_US, now)
        if wait and not self._batcher.serves_others(seat, now):
            seat.attention.forgive()
            wait = 0.0
        if wait:
            self.held[seat] = now + min(wait, _LOOK_SECONDS)
        return wait > 0

    def over(self, now: float) -> list[Seat]:
        """Those to look at again, who are held no more."""
        seats = [seat for seat, until in self.held.items() if until <= now]
        for seat in seats:
            del self.held[seat]
        return seats
