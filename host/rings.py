"""A pool of rings that the backend has mapped already, so that a launch never waits for it.

A ring's number is its seat's number, and seats must grow in launch order: rings are made in order
and taken in order. A launch that needs a larger one than the pool's therefore drops those before.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable

from msgspec import Struct

from piehost.host.shm import create_ring, seal_ring
from piehost.wire.step import AddRing, DropRing

READY_RINGS = 32


class Ring(Struct, frozen=True):
    """A sealed ring. The taker closes `fd` when it has passed it on."""

    number: int
    fd: int
    size: int


class RingPool:
    """Rings of one backend. `send(message, fds)` reaches it."""

    def __init__(
        self, size: int, first_number: int, send: Callable[[AddRing | DropRing, list[int]], None]
    ) -> None:
        self.size = size
        self.next_number = first_number
        self._send = send
        self._ready: deque[Ring] = deque()
        self._coming: deque[Ring] = deque()  # in number order; the backend answers in order
        self.fill(0)

    @property
    def ready(self) -> int:
        return len(self._ready)

    def take(self, size: int) -> Ring | None:
        """A ring of at least `size` octets, or None: then it comes, and the caller asks again."""
        if size > self.size:
            rings = [*self._ready, *self._coming]
            found = next((ring for ring in rings if ring.size >= size), None)
            if found is None:
                self._make(size)
                return None
            while self._ready and self._ready[0].size < size:
                self.drop(self._ready.popleft())
        return self._ready.popleft() if self._ready else None

    def fill(self, waiting: int) -> None:
        """Asks for more when less than half is left; `waiting` launches want one at once."""
        have = len(self._ready) + len(self._coming)
        if have < max(READY_RINGS // 2, waiting):
            for _ in range(READY_RINGS + waiting - have):
                self._make(self.size)

    def _make(self, size: int) -> None:
        ring = Ring(self.next_number, create_ring(f"piehost-ring-{self.next_number}", size), size)
        self.next_number += 1
        self._coming.append(ring)
        self._send(AddRing(ring=ring.number, size=size), [ring.fd])

    def mapped(self, number: int) -> None:
        """The backend has mapped ring `number` for writing: nobody else can from here on."""
        if self._coming and self._coming[0].number == number:
            ring = self._coming.popleft()
            seal_ring(ring.fd)
            self._ready.append(ring)

    def drop(self, ring: Ring) -> None:
        """An unused ring goes away, in the backend too."""
        os.close(ring.fd)
        self._send(DropRing(ring=ring.number), [])

    def close(self) -> None:
        """The backend is gone."""
        for ring in (*self._ready, *self._coming):
            os.close(ring.fd)
        self._ready.clear()
        self._coming.clear()
