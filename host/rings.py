"""A pool of rings that the backend has mapped already, so that a launch never waits for it.

An entry is a pair: ring out and ring in. Its number is its seat's number, and seats must grow in
launch order: pairs are made in order and taken in order. A launch that needs larger ones than the
pool's therefore drops those before.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable

from msgspec import Struct

from piehost.host.shm import create_ring, create_ring_in, seal_ring
from piehost.wire.step import AddRing, DropRing

READY_RINGS = 32


class RingSizes(Struct, frozen=True):
    """In octets."""

    out: int
    into: int

    def hold(self, other: RingSizes) -> bool:
        return self.out >= other.out and self.into >= other.into

    def at_least(self, other: RingSizes) -> RingSizes:
        return RingSizes(max(self.out, other.out), max(self.into, other.into))


class Rings(Struct, frozen=True):
    """A sealed pair. The taker closes `out` and `into` when it has passed them on."""

    number: int
    out: int
    into: int
    sizes: RingSizes

    def close(self) -> None:
        os.close(self.out)
        os.close(self.into)


class RingPool:
    """Rings of one backend. `send(message, fds)` reaches it."""

    def __init__(
        self,
        sizes: RingSizes,
        first_number: int,
        send: Callable[[AddRing | DropRing, list[int]], None],
    ) -> None:
        self.sizes = sizes
        self.next_number = first_number
        self._send = send
        self._ready: deque[Rings] = deque()
        self._coming: deque[Rings] = deque()  # in number order; the backend answers in order
        with contextlib.suppress(OSError):  # the first launch tries again, and says so
            self.fill(0)

    @property
    def ready(self) -> int:
        return len(self._ready)

    def take(self, sizes: RingSizes) -> Rings | None:
        """A pair of at least `sizes`, or None: then it comes, and the caller asks again. OSError
        if descriptors are used up."""
        if not self.sizes.hold(sizes):
            made = [*self._ready, *self._coming]
            if not any(rings.sizes.hold(sizes) for rings in made):
                self._make(self.sizes.at_least(sizes))
                return None
            while self._ready and not self._ready[0].sizes.hold(sizes):
                self.drop(self._ready.popleft())
        return self._ready.popleft() if self._ready else None

    def fill(self, waiting: int) -> None:
        """Asks for more when less than half is left; `waiting` launches want one at once. OSError
        if descriptors are used up and none is there or on its way."""
        have = len(self._ready) + len(self._coming)
        if have < max(READY_RINGS // 2, waiting):
            try:
                for _ in range(READY_RINGS + waiting - have):
                    self._make(self.sizes)
            except OSError:  # those that there are will do for now
                if not (self._ready or self._coming):
                    raise

    def _make(self, sizes: RingSizes) -> None:
        number = self.next_number
        out = create_ring(f"piehost-ring-out-{number}", sizes.out)
        try:
            into = create_ring_in(f"piehost-ring-in-{number}", sizes.into)
        except BaseException:
            os.close(out)
            raise
        rings = Rings(number, out, into, sizes)
        try:
            self._send(AddRing(ring=number, size=sizes.out, in_size=sizes.into), [out, into])
        except BaseException:
            rings.close()
            raise
        self.next_number += 1
        self._coming.append(rings)

    def mapped(self, number: int) -> None:
        """The backend has mapped pair `number`: nobody else can write its ring out from here on."""
        if self._coming and self._coming[0].number == number:
            rings = self._coming.popleft()
            seal_ring(rings.out)
            self._ready.append(rings)

    def drop(self, rings: Rings) -> None:
        """An unused pair goes away, in the backend too."""
        rings.close()
        self._send(DropRing(ring=rings.number), [])

    def close(self) -> None:
        """The backend is gone."""
        for rings in (*self._ready, *self._coming):
            rings.close()
        self._ready.clear()
        self._coming.clear()
