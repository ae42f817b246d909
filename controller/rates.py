"""An inferlet's rates: token buckets that slow it and fail nothing."""

from __future__ import annotations

from typing import Final

from inferlet.abi import AnyCommand

from piehost.wire.control import Rates

_WAKES_A_SECOND: Final = 20


class Bucket:
    """Fills by `rate` a second and holds a second's worth. Times are seconds, monotonic."""

    __slots__ = ("_at", "_level", "_rate", "most")

    def __init__(self, rate: int, now: float) -> None:
        self._rate = self.most = max(rate, 1)
        self._level = float(self.most)
        self._at = now

    def wait(self, wanted: int, now: float) -> float:
        """Seconds until so many may be taken: all it can hold, if that is less."""
        self._level = min(self.most, self._level + (now - self._at) * self._rate)
        self._at = now
        return max(0.0, (min(wanted, self.most) - self._level) / self._rate)

    def whole(self, now: float) -> int:
        """How many may be taken now."""
        self.wait(0, now)
        return max(0, int(self._level))

    def take(self, count: int) -> None:
        """May leave less than nothing, if they could not be taken one after the other."""
        self._level -= count


class Pace:
    """One inferlet's buckets, and how long they have held it up."""

    def __init__(self, rates: Rates, now: float, slowed: float) -> None:
        self.tokens = _bucket(rates.tokens_per_second, now)
        self.commands = _bucket(rates.commands_per_second, now)
        self._tokens_due = 0.0
        self._slowed = slowed  # seconds up to
        self._slowed_until = now  # which may lie ahead

    def tokens_due(self, wanted: int, now: float) -> float:
        """When so many inputs of a forward may go; 0 is now. One that waits holds up what the
        inferlet has behind it, so that small calls do not empty the bucket before a large one."""
        if now < self._tokens_due:
            return self._tokens_due
        wait = self.tokens.wait(wanted, now) if self.tokens is not None else 0.0
        if wait <= 0.0:
            return 0.0
        self._tokens_due = now + wait
        self._slow(now, self._tokens_due)
        return self._tokens_due

    def take_tokens(self, count: int) -> None:
        if self.tokens is not None:
            self.tokens.take(count)

    def commands_due(self, wanted: int, now: float) -> float:
        """When to go on with `wanted` commands: not with each by itself if there are many."""
        if self.commands is None:
            return now
        wanted = min(wanted, max(1, self.commands.most // _WAKES_A_SECOND))
        until = now + self.commands.wait(wanted, now)
        self._slow(now, until)
        return until

    def slowed(self, now: float) -> float:
        """Seconds that the inferlet was held up by one of them or both."""
        return self._slowed - max(0.0, self._slowed_until - now)

    def _slow(self, now: float, until: float) -> None:
        start = max(now, self._slowed_until)
        if until > start:
            self._slowed += until - start
            self._slowed_until = until


def _bucket(rate: int | None, now: float) -> Bucket | None:
    return None if rate is None else Bucket(rate, now)


def split(
    frames: list[list[AnyCommand]], count: int
) -> tuple[list[list[AnyCommand]], list[list[AnyCommand]]]:
    """The first `count` commands, and the rest."""
    first: list[list[AnyCommand]] = []
    for i, frame in enumerate(frames):
        if count < len(frame):
            return [*first, frame[:count]] if count else first, [frame[count:], *frames[i + 1 :]]
        first.append(frame)
        count -= len(frame)
    return first, []
