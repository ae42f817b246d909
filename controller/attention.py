"""How much of the controller an inferlet may have while the accelerator works for others.

What the controller does for an inferlet costs that next to nothing of its own: neither its share of
the processors nor its socket holds up one that floods. So this time is counted against it. Parts of
steps earn what they take, so that those who generate are not held up; and whoever is alone has all.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .batcher import Batcher
    from .seat import Seat

_SHARE: Final = 1 / 64  # of the controller's time; delays others' steps by no more than that
_HELD_SHARE: Final = 1 / 8  # of all together who have had theirs
_PART_SECONDS: Final = 200e-6  # a queue's part of a step, its commands and answers with it
_PLAIN_SECONDS: Final = 300e-6  # a usual frame takes less
_SLICE_SECONDS: Final = 0.001  # worth going on for
_MOST_WAIT: Final = 0.25  # until the next look: there may be fewer by then


class Allowance:
    """Of an inferlet and its children: seconds of the controller's processor time. It fills with
    time and with each part of a step, holds a second's worth, and may owe as much."""

    __slots__ = ("_at", "_rate", "left")

    def __init__(self, now: float) -> None:
        """Full. `now`: seconds, monotonic."""
        self._at = now
        self._rate = self.left = _SHARE

    def set_share(self, share: int) -> None:
        """Percent of what is usual."""
        self._rate = _SHARE * share / 100

    def fill(self) -> None:
        self.left = self._rate

    def earn(self) -> None:
        """A part of a step was taken for it."""
        self.left = min(self._rate, self.left + _PART_SECONDS)

    def spend(self, seconds: float) -> None:
        self.left = max(-self._rate, self.left - seconds)

    def wait(self, now: float, held: int) -> float:
        """Seconds until there is enough to go on, if so many are held."""
        rate = min(self._rate, _HELD_SHARE / held)
        self.left = min(self._rate, self.left + (now - self._at) * rate)
        self._at = now
        return max(0.0, (min(_SLICE_SECONDS, self._rate) - self.left) / rate)


class Attention:
    """`held`: those who have had theirs, and when to look again."""

    def __init__(self, batcher: Batcher) -> None:
        self.held: dict[Seat, float] = {}
        self._batcher = batcher
        self._processor = 0.0  # seconds that this thread had used by the latest look

    def begin_turn(self) -> None:
        """Another turn of the loop."""
        self._processor = time.thread_time()

    def spent(self, seat: Seat, seconds: float, now: float) -> None:
        """The controller worked for it so long, or waited for a processor meanwhile. So of what
        takes long no more counts than the processor time since the last look, which is dearer to
        ask for."""
        if seconds > _PLAIN_SECONDS:
            before, self._processor = self._processor, time.thread_time()
            seconds = min(seconds, self._processor - before)
        allowance = seat.allowance
        allowance.spend(seconds)
        if allowance.left <= 0 and self._batcher.others_until(seat, now) <= now:
            allowance.fill()

    def holds(self, seat: Seat, now: float) -> bool:
        """Whether it is to wait, with what it says unread. To be asked if nothing is left."""
        wait = seat.allowance.wait(now, len(self.held) + 1)
        if wait and self._batcher.others_until(seat, now) > now:
            self.held[seat] = now + min(wait, _MOST_WAIT)
            return True
        return False

    def over(self, now: float) -> list[Seat]:
        """Those who are held no more, to be looked at again."""
        seats = [seat for seat in self.held if self._until(seat, now) <= now]
        for seat in seats:
            del self.held[seat]
        return seats

    def due(self, now: float) -> float:
        """When the first of them is to be looked at, if nothing comes before."""
        return min(self._until(seat, now) for seat in self.held)

    def _until(self, seat: Seat, now: float) -> float:
        return min(self.held[seat], self._batcher.others_until(seat, now))
