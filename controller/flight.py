"""A step on its way: what each part of it owes when the backend answers.

Items are finished in the order they were packed, which is queue order, so a token found dead is
known before anything that was made from it is looked at.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Protocol

from inferlet.errors import BackendError, InferletError

from .machine import Machine
from .tables import EmbBlock, Entry, KvBlock, Late, Queue, any_dead


class Flight:
    """One unanswered step."""

    __slots__ = ("broken", "items", "queues", "step")

    def __init__(self, step: int) -> None:
        self.step = step
        self.items: list[Item] = []
        self.queues: set[Queue] = set()
        self.broken: dict[Queue, InferletError] = {}  # queues whose part of the step before failed

    def touch(self, queue: Queue) -> None:
        """A part of `queue` is in this step: its later answers wait for it."""
        queue.flight = self
        self.queues.add(queue)

    def add(self, queue: Queue, item: Item) -> None:
        self.touch(queue)
        self.items.append(item)


class Outcome:
    """A step's answer while its items are being finished."""

    __slots__ = ("clear_slots", "dists", "now", "tokens")

    def __init__(self, tokens: array[int], dists: list[int], now: float) -> None:
        self.tokens = tokens
        self.dists = dists
        self.now = now  # seconds, monotonic
        self.clear_slots: array[int] = array("i")  # writes to be undone by the next step


class Item(Protocol):
    queue: Queue

    def finish(self, outcome: Outcome) -> None: ...

    def fail(self, error: InferletError) -> None:
        """The step failed as a whole."""


class Answer:
    """An answer that had to wait for earlier parts of its queue. It counts as queued until then."""

    __slots__ = ("queue", "request", "value")

    def __init__(self, queue: Queue, request: int, value: object) -> None:
        self.queue = queue
        self.request = request
        self.value = value  # or the InferletError to report
        queue.seat.queued += 1

    def finish(self, outcome: Outcome) -> None:
        if isinstance(self.value, InferletError):
            self.fail(self.value)
        else:
            self.queue.seat.queued -= 1
            self.queue.seat.answer(self.request, self.value)

    def fail(self, error: InferletError) -> None:
        self.queue.seat.queued -= 1
        self.queue.seat.fail(self.request, error)


class Sampled:
    """A token. Its answer is nil if something it was made from turned out dead."""

    __slots__ = ("late", "lazy", "queue", "request", "seat", "stop")

    def __init__(
        self, queue: Queue, late: Late, request: int | None, stop: list[int], lazy: bool
    ) -> None:
        self.queue = queue
        self.seat = queue.seat
        self.late = late
        self.request = request
        self.stop = stop
        self.lazy = lazy

    def finish(self, outcome: Outcome) -> None:
        late = self.late
        if late.parents and any_dead(late.parents):
            late.dead = True
            late.parents = ()
            self.seat.answer(self.request, None)
            return
        value = outcome.tokens[late.index]
        late.value = value
        late.parents = ()
        late.dead = value in self.stop
        self.seat.stats.tokens_out += 1
        if self.lazy and not late.dead:
            self.seat.answer_lazily(self.request, value, outcome.now)
        else:
            self.seat.answer(self.request, value)

    def fail(self, error: InferletError) -> None:
        self.late.dead = self.late.lost = True
        self.late.parents = ()
        self.seat.fail(self.request, error)


class Dist:
    """A distribution that the backend wrote into the inferlet's ring."""

    __slots__ = ("index", "lates", "queue", "request", "seat")

    def __init__(
        self, queue: Queue, index: int, lates: tuple[Late, ...], request: int | None
    ) -> None:
        self.queue = queue
        self.seat = queue.seat
        self.index = index
        self.lates = lates
        self.request = request

    def finish(self, outcome: Outcome) -> None:
        written = outcome.dists[self.index]
        if any_dead(self.lates):
            self.seat.answer(self.request, None)
        elif written < 0:
            self.seat.fail(
                self.request, BackendError("the backend has no such ring", "launch again")
            )
        else:
            self.seat.stats.ring_bytes += 8 * written
            self.seat.answer(self.request, written)

    def fail(self, error: InferletError) -> None:
        self.seat.fail(self.request, error)


class Written:
    """A write into KV that is undone if a token it was made from is dead."""

    __slots__ = ("block", "first", "lates", "length", "queue")

    def __init__(
        self, queue: Queue, block: KvBlock, first: int, length: int, lates: tuple[Late, ...]
    ) -> None:
        self.queue = queue
        self.block = block
        self.first = first
        self.length = length
        self.lates = lates

    def finish(self, outcome: Outcome) -> None:
        block = self.block
        if block.alive and any_dead(self.lates):
            block.conditional = ()
            block.note_undo(self.first)
            slots = block.slots(self.first, self.length)
            outcome.clear_slots.extend(slot for slot in slots if slot >= 0)  # < 0: page freed since

    def fail(self, error: InferletError) -> None:
        self.block.conditional = ()


class Kept:
    """Hidden states that a forward leaves in output embeds; a failed step leaves none."""

    __slots__ = ("emb", "first", "hidden", "machine", "queue")

    def __init__(
        self, queue: Queue, machine: Machine, emb: EmbBlock, first: int, hidden: list[Entry]
    ) -> None:
        self.queue = queue
        self.machine = machine
        self.emb = emb
        self.first = first
        self.hidden = hidden

    def finish(self, outcome: Outcome) -> None:
        pass

    def fail(self, error: InferletError) -> None:
        for i, hidden in enumerate(self.hidden, self.first):
            if i < len(self.emb.entries) and self.emb.entries[i] is hidden:  # else freed or filled
                self.machine.set_entries(self.emb, i, [None])


def finish(flight: Flight, outcome: Outcome) -> None:
    """Completes every item of an answered step."""
    broken = flight.broken
    for item in flight.items:
        if broken and item.queue in broken:
            item.fail(broken[item.queue])
        else:
            item.finish(outcome)
    _land(flight)


def fail(flight: Flight, error: InferletError, behind: Iterable[Flight]) -> None:
    """The step came to nothing: its queues stop with `error`, their parts of the steps `behind`
    it included. Their own errors came later in their order, so they do not count."""
    for queue in flight.queues:
        queue.error = flight.broken.setdefault(queue, error)
        for later in behind:
            later.broken.setdefault(queue, queue.error)
        for block in queue.seat.kvs.values():
            block.regular = False  # unknown what was written: the device's record of slots decides
    for item in flight.items:
        item.fail(flight.broken[item.queue])
    _land(flight)


def _land(flight: Flight) -> None:
    for queue in flight.queues:
        if queue.flight is flight:
            queue.flight = None
