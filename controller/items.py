"""Parts of a step on its way, one kind each: what its answer makes of them (`flight.py`)."""

from __future__ import annotations

from inferlet.errors import ArgumentError, BackendError, InferletError, MaskError

from .flight import Outcome
from .machine import Machine
from .tables import EmbBlock, Entry, KvBlock, Late, Queue, any_dead


class Answer:
    """An answer that had to wait for earlier parts of its queue. It counts as queued until then."""

    __slots__ = ("carried_out", "queue", "request", "value")

    def __init__(self, queue: Queue, request: int, value: object, carried_out: bool) -> None:
        self.queue = queue
        self.request = request
        self.value = value  # or the InferletError to report
        self.carried_out = carried_out  # whatever came before it
        queue.seat.queued += 1

    def finish(self, outcome: Outcome) -> None:
        self._answer(self.value)

    def fail(self, error: InferletError, outcome: Outcome | None) -> None:
        self._answer(self.value if self.carried_out else error)

    def _answer(self, value: object) -> None:
        self.queue.seat.queued -= 1
        if isinstance(value, InferletError):
            self.queue.seat.fail(self.request, value)
        else:
            self.queue.seat.answer(self.request, value)


class Sampled:
    """A token. Its answer is nil if something it was made from turned out dead."""

    __slots__ = ("late", "lazy", "queue", "request", "seat", "stop")
    with_more = False

    def __init__(
        self, queue: Queue, late: Late, request: int | None, stop: list[int], lazy: bool
    ) -> None:
        self.queue = queue
        self.seat = queue.seat
        self.late = late
        self.request = request
        self.stop = stop
        self.lazy = lazy

    def finish(self, outcome: Outcome) -> InferletError | None:
        late = self.late
        if late.parents and any_dead(late.parents):
            late.dead = True
            late.parents = ()
            self.seat.answer(self.request, None)
            return None
        value = outcome.tokens[late.index]
        answer: object = value
        if value < 0 or self.with_more:
            answer = self._answer(value, outcome)
            if isinstance(answer, InferletError):
                self.fail(answer, outcome)
                return answer
        late.value = value
        late.parents = ()
        late.dead = value in self.stop
        self.seat.stats.tokens_out += 1
        if self.lazy and not late.dead:
            self.seat.answer_lazily(self.request, answer, outcome.now)
        else:
            self.seat.answer(self.request, answer)
        return None

    def _answer(self, value: int, outcome: Outcome) -> object:
        """What to answer beside a value alone, or the InferletError."""
        return MaskError(
            "the mask of a sample allows no token of the vocabulary",
            "set a bit in ring in, and leave the octets alone until the answer",
        )

    def fail(self, error: InferletError, outcome: Outcome | None) -> None:
        self.late.dead = self.late.lost = True
        self.late.parents = ()
        self.seat.fail(self.request, error)


class SampledWithMore(Sampled):
    """A token whose answer has its log-probability and, maybe, a distribution."""

    __slots__ = ("dist", "logprob")
    with_more = True

    def __init__(
        self,
        queue: Queue,
        late: Late,
        request: int | None,
        stop: list[int],
        lazy: bool,
        logprob: int,
        dist: int | None,
    ) -> None:
        super().__init__(queue, late, request, stop, lazy)
        self.logprob = logprob  # index among the step's
        self.dist = dist

    def _answer(self, value: int, outcome: Outcome) -> object:
        if value < 0:
            return super()._answer(value, outcome)
        written = 0 if self.dist is None else outcome.dists[self.dist]
        if written < 0:
            return _no_ring()
        self.seat.stats.ring_bytes += 8 * written
        return (value, outcome.logprobs[self.logprob], written)


class _RingOut:
    """What the backend wrote into the inferlet's ring out."""

    __slots__ = ("index", "lates", "queue", "request", "seat")

    def __init__(
        self, queue: Queue, index: int, lates: tuple[Late, ...], request: int | None
    ) -> None:
        self.queue = queue
        self.seat = queue.seat
        self.index = index  # among the step's
        self.lates = lates
        self.request = request

    def _written(self, count: int, size: int) -> InferletError | None:
        """Answers how many entries of `size` octets were written; -1 if there is no ring."""
        if any_dead(self.lates):
            self.seat.answer(self.request, None)
        elif count < 0:
            error = _no_ring()
            self.seat.fail(self.request, error)
            return error
        else:
            self.seat.stats.ring_bytes += size * count
            self.seat.answer(self.request, count)
        return None

    def fail(self, error: InferletError, outcome: Outcome | None) -> None:
        self.seat.fail(self.request, error)


class Dist(_RingOut):
    """A distribution."""

    __slots__ = ()

    def finish(self, outcome: Outcome) -> InferletError | None:
        return self._written(outcome.dists[self.index], 8)


class VectorsOut(_RingOut):
    """Vectors of `size` octets each."""

    __slots__ = ("size",)

    def __init__(
        self, queue: Queue, index: int, lates: tuple[Late, ...], request: int | None, size: int
    ) -> None:
        super().__init__(queue, index, lates, request)
        self.size = size

    def finish(self, outcome: Outcome) -> InferletError | None:
        return self._written(outcome.embeds[self.index], self.size)


def _no_ring() -> BackendError:
    return BackendError("the backend has no such ring", "launch again")


class Written:
    """A write into KV that is undone if a token it was made from is dead, or it fails.

    `fresh`: its slots were never written before.
    """

    __slots__ = ("block", "first", "fresh", "lates", "length", "queue")

    def __init__(
        self,
        queue: Queue,
        block: KvBlock,
        first: int,
        length: int,
        lates: tuple[Late, ...],
        fresh: bool,
    ) -> None:
        self.queue = queue
        self.block = block
        self.first = first
        self.length = length
        self.lates = lates
        self.fresh = fresh

    def finish(self, outcome: Outcome) -> None:
        if any_dead(self.lates):
            self._undo(outcome)

    def fail(self, error: InferletError, outcome: Outcome | None) -> None:
        if outcome is None:
            self.block.conditional = ()
        else:
            self._undo(outcome)

    def _undo(self, outcome: Outcome) -> None:
        block = self.block
        block.conditional = ()
        if not block.alive:
            return
        if self.fresh:
            block.note_undo(self.first)
        else:
            block.regular = False
        slots = block.slots(self.first, self.length)
        outcome.clear_slots.extend(slot for slot in slots if slot >= 0)  # < 0: page freed since


class Kept:
    """Hidden states that a forward leaves in output embeds; none if it fails."""

    __slots__ = ("emb", "first", "hidden", "machine", "queue")

    def __init__(
        self, queue: Queue, machine: Machine, emb: EmbBlock, first: int, hidden: list[Entry]
    ) -> None:
        self.queue = queue
        self.machine = machine
        self.emb = emb
        self.first = first
        self.hidden = hidden

    def finish(self, outcome: Outcome) -> InferletError | None:
        return None

    def fail(self, error: InferletError, outcome: Outcome | None) -> None:
        self.machine.unwrite(self.emb, self.first, self.hidden)


class VectorsIn(Kept):
    """Vectors of the inferlet's ring that fill embeds."""

    __slots__ = ("index", "request")

    def __init__(
        self,
        queue: Queue,
        machine: Machine,
        emb: EmbBlock,
        first: int,
        hidden: list[Entry],
        index: int,
        request: int | None,
    ) -> None:
        super().__init__(queue, machine, emb, first, hidden)
        self.index = index  # among the step's
        self.request = request

    def finish(self, outcome: Outcome) -> InferletError | None:
        if self.index in outcome.refused:
            error = ArgumentError(
                "write_emb of numbers that are not finite in the type that the model computes in",
                "look for NaN, infinities and values too large, and leave the octets alone until "
                "the answer",
            )
            self.fail(error, outcome)
            return error
        self.queue.seat.stats.ring_bytes += 4 * self.machine.model.hidden_size * len(self.hidden)
        self.queue.seat.answer(self.request, None)
        return None

    def fail(self, error: InferletError, outcome: Outcome | None) -> None:
        super().fail(error, outcome)
        self.queue.seat.fail(self.request, error)
