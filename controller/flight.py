"""A step on its way: what each part of it owes when the backend answers.

Items (`items.py`) are finished in the order they were packed, which is queue order: a token found
dead is known before anything that was made from it is looked at, and a part that failed before what
its queue had behind it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from inferlet.errors import InferletError

from piehost.wire.step import StepDone

from .tables import Queue

if TYPE_CHECKING:
    from .seat import Seat


class Flight:
    """One unanswered step."""

    __slots__ = ("broken", "items", "queues", "seats", "step")

    def __init__(self, step: int) -> None:
        self.step = step
        self.items: list[Item] = []
        self.queues: set[Queue] = set()
        self.seats: set[Seat] = set()  # whose pages it uses or brings back
        self.broken: dict[Queue, InferletError] = {}  # queues that failed in it or a step before

    def touch(self, queue: Queue) -> None:
        """A part of `queue` is in this step: its later answers wait for it."""
        queue.flight = self
        self.queues.add(queue)
        self.keep(queue.seat)

    def keep(self, seat: Seat) -> None:
        """The inferlet's pages stay where this step has them until it is answered."""
        seat.last_step = self.step
        self.seats.add(seat)

    def add(self, queue: Queue, item: Item) -> None:
        self.touch(queue)
        self.items.append(item)


class Outcome:
    """A step's answer while its items are being finished. `now`: seconds, monotonic."""

    __slots__ = ("clear_slots", "dists", "embeds", "logprobs", "now", "refused", "tokens")

    def __init__(self, answer: StepDone, now: float) -> None:
        self.tokens = array("i")
        self.tokens.frombytes(answer.tokens)
        self.logprobs = array("f")
        self.logprobs.frombytes(answer.logprobs)
        self.dists = answer.dists
        self.refused = answer.refused
        self.embeds = answer.embeds
        self.now = now
        self.clear_slots: array[int] = array("i")  # writes to be undone by the next step


class Item(Protocol):
    queue: Queue

    def finish(self, outcome: Outcome) -> InferletError | None:
        """Owes nothing afterwards. An error has been answered, and stops the queue."""

    def fail(self, error: InferletError, outcome: Outcome | None) -> None:
        """Something before it on its queue failed. `outcome` None: the whole step did, so that
        the device has kept nothing of it."""


def finish(flight: Flight, outcome: Outcome, behind: Iterable[Flight]) -> None:
    """Completes every item of an answered step. Those of a queue that come after one that failed
    fail with it, in the steps `behind` too."""
    broken = flight.broken
    for item in flight.items:
        if broken and item.queue in broken:
            item.fail(broken[item.queue], outcome)
        elif (error := item.finish(outcome)) is not None:
            _stop(flight, item.queue, error, behind)
    _land(flight)


def fail(flight: Flight, error: InferletError, behind: Iterable[Flight]) -> None:
    """The step came to nothing: its queues stop with `error`, their parts of the steps `behind`
    it included."""
    for queue in flight.queues:
        _stop(flight, queue, flight.broken.get(queue, error), behind)
        for block in queue.seat.kvs.values():
            block.regular = False  # unknown what was written: the device's record of slots decides
    for item in flight.items:
        item.fail(flight.broken[item.queue], None)
    _land(flight)


def _stop(flight: Flight, queue: Queue, error: InferletError, behind: Iterable[Flight]) -> None:
    """The queue's own error, if it has one, came later in its order, so it does not count."""
    queue.error = flight.broken[queue] = error
    for later in behind:
        later.broken.setdefault(queue, error)


def _land(flight: Flight) -> None:
    for seat in flight.seats:
        seat.landed = flight.step
    for queue in flight.queues:
        if queue.flight is flight:
            queue.flight = None
        if queue.risky is flight:
            queue.risky = None
