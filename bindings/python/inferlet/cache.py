"""The keys and values of a context's tokens: what is computed, what later tokens see of it.

The last token is computed only when something comes after it, because its forward pass is what
the next sample needs. Slots from `written` on may hold leftovers of a generation that was given
up; nothing reads them and later writes replace them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .distribution import Distribution
from .errors import InferletError
from .future import Future
from .queue import Queue
from .ranges import Ranges
from .sampling import Token
from .slots import Slots
from .spans import Embeds, KvSpan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .model import Model

MAX_INPUTS = 512  # of one forward: keeps others' decode steps short
_FEW_INPUTS = 32  # a forward of fewer is not worth its step while others are about to be done
_MASK_BYTES = 48_000  # of one forward, in a frame of 64 Ki


class Window(NamedTuple):
    """What a generated token sees of those before it: the first `sink`, and the last `recent`."""

    sink: int
    recent: int


class Draw(Protocol):
    """Queues the sample of one step."""

    def __call__(self, out: Embeds, *, lazy: bool, rebind: Token | None) -> Token: ...


_alive: weakref.WeakSet[KvCache] = weakref.WeakSet()


class KvCache:
    """Keys and values in pages, on a queue of their own. Every call queues commands and returns."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.queue = Queue(model)
        self.slots = Slots(self.queue)
        self.written = 0  # tokens whose keys and values are in the slots before it
        self.hidden = Ranges()  # left out of what a forward reads
        self.evicted = Ranges()  # of these, those whose pages are given back
        self.window: Window | None = None
        self._out: Embeds | None = None  # the embed that decode steps read and write
        self._late: Token | None = None  # its handle is rebound at every step
        self._inputs = 0  # embeds that a prefill on its way may hold
        self._prefill: Future[Any] | None = None  # once it is answered, that prefill is done
        _alive.add(self)

    def close(self) -> None:
        """Gives everything back."""
        self.queue.destroy()
        _alive.discard(self)

    # --- tokens -----------------------------------------------------------------------------

    def write(self, tokens: Sequence[int], end: int, output: Embeds | None = None) -> None:
        """Queues the forward passes of `tokens` before `end` that are not written; the hidden
        state of the last goes to `output`. What is evicted is left out, but for that last one."""
        if self.written >= end:
            return
        self.slots.unshare(self.written)
        for first, stop in self.evicted.outside(self.written, end):
            self._forward(tokens, first, stop, output if stop == end else None)
        if output is not None and self.written < end:
            self._forward(tokens, end - 1, end, output)
        self.written = end

    def _forward(self, tokens: Sequence[int], begin: int, end: int, output: Embeds | None) -> None:
        """The forward passes from `begin` to `end`, in chunks."""
        self._reserve(begin, end)
        while begin < end:
            reads = self._visible(0, begin)
            count = min(end - begin, self._most_inputs(end - begin))
            if self.hidden.within(begin, end):
                while count * (sum(map(len, reads)) + count + 7) > 8 * _MASK_BYTES and count > 1:
                    count //= 2
            slots = self.slots.spans(begin, begin + count)[0]  # within one handle
            stop = begin + len(slots)
            inputs = self.queue.embed_txt(tokens[begin:stop], begin)
            self.queue.forward(
                inputs,
                read=reads,
                write=slots,
                outputs=output if output is not None and stop == end else 0,
                mask=self._mask(sum(map(len, reads)), begin, stop),
            )
            self.queue.dealloc_emb(inputs)
            self._inputs = max(self._inputs, len(slots))
            begin = self.written = stop

    def _most_inputs(self, wanted: int) -> int:
        """How many embeds a chunk may take: those of all contexts count against one quota."""
        others = [c for c in _alive if c is not self and c.model.runtime is self.model.runtime]
        waits = sorted((c for c in others if c._prefill is not None), key=lambda c: c._inputs)
        while True:
            for cache in others:
                if cache._prefill is not None and cache._prefill.answered:
                    cache.prefilled()
            held = 1 + sum(1 + cache._inputs for cache in others)
            # half of what is left, so that other contexts can begin as well
            share = (self.model.runtime.startup.limits.embeds - held) // 2
            if share >= min(wanted, _FEW_INPUTS) or not waits:
                return max(1, min(MAX_INPUTS, share))
            if (prefill := waits.pop()._prefill) is not None:
                with contextlib.suppress(InferletError):  # its own context will tell
                    prefill.wait()

    def prefilled(self) -> None:
        """What was queued was carried out, so the embeds it held are free."""
        self._inputs, self._prefill = 0, None

    def _visible(self, first: int, end: int) -> list[KvSpan]:
        """The slots from `first` to `end` that are not hidden."""
        if not self.hidden:
            return self.slots.spans(first, end)  # as most are
        return [s for a, b in self.hidden.outside(first, end) for s in self.slots.spans(a, b)]

    def _mask(self, reads: int, begin: int, end: int) -> NDArray[np.bool_] | None:
        """Who sees whom, where one of the inputs from `begin` to `end` is hidden from those behind
        it: bool of shape (inputs, slots read + inputs). Each sees itself."""
        hidden = self.hidden.within(begin, end - 1)
        if not hidden:
            return None
        import numpy as np  # only masks need it here, and it is slow to import

        count = end - begin
        seen = np.tri(count, dtype=np.bool_)
        for a, b in hidden:
            seen[:, a - begin : b - begin] = False
        np.fill_diagonal(seen, True)
        return np.hstack([np.ones((count, reads), np.bool_), seen])

    def _reserve(self, first: int, end: int) -> None:
        """Pages for the slots from `first` to `end`, those evicted being given back before."""
        if end > self.slots.end:
            self._sweep()
        self.slots.reserve(first, end)

    # --- generation -------------------------------------------------------------------------

    def first_step(self, tokens: Sequence[int], draw: Draw) -> Token:
        """Queues the sample of what comes after `tokens`."""
        token = draw(self._last(tokens), lazy=False, rebind=self._late)
        self._prefill = self._late = token
        return token

    def distribution(self, tokens: Sequence[int], k: int) -> Future[Distribution]:
        """The `k` most probable tokens after `tokens`."""
        self._prefill = answer = self.queue.get_next_dist(self._last(tokens), k)
        return answer

    def _last(self, tokens: Sequence[int]) -> Embeds:
        """The hidden state of the last of `tokens`, whose forward pass runs (again)."""
        if self._out is None:
            self._out = self.queue.alloc_emb(1)
        self.written = min(self.written, len(tokens) - 1)
        self.write(tokens, len(tokens), self._out)
        return self._out

    def steps(
        self, position: int, count: int, draw: Draw, *, lazy: bool, last: bool
    ) -> list[Token]:
        """Queues `count` steps, each of which embeds the token sampled before it, at `position`
        and so on, and samples the next. `lazy`: their answers may wait for each other; `last`: but
        for that of the last step."""
        assert self._out is not None and self._late is not None, "after the first step"
        end = position + count
        self._reserve(position, end)
        queue, out, steps = self.queue, self._out, []
        for at in range(position, end):
            queue.embed_txt([self._late], at, into=out)
            (slot,) = self.slots.spans(at, at + 1)
            queue.forward(out, read=self._in_window(at), write=slot, outputs=out)
            self._late = draw(out, lazy=lazy and not (last and at == end - 1), rebind=self._late)
            steps.append(self._late)
        return steps

    def _in_window(self, position: int) -> list[KvSpan]:
        """The slots that a generated token at `position` sees."""
        if self.window is None or position - self.window.recent <= self.window.sink:
            return self._visible(0, position)
        sink, recent = self.window
        return self._visible(0, sink) + self._visible(position - recent, position)

    def abandon(self, steps: Sequence[Future[Any]], *, cancel: bool) -> None:
        """Waits for the steps of a generation that was given up. `cancel`: drops what of them has
        not run; the first of all must have. Raises what a step failed with, but for that."""
        if cancel:
            self.queue.cancel()
        for step in steps:
            try:
                step.result()
            except InferletError as error:
                if error.name != "cancelled":
                    raise
        if cancel:  # pages that the cancelled steps were to get may not have been allocated
            self.slots.cut(self.written)
            self.queue.vouch()

    # --- what is seen and held --------------------------------------------------------------

    def evict(self, first: int, end: int) -> None:
        """Hides the tokens from `first` to `end` for ever and frees the pages that they fill."""
        self.hidden.add(first, end)
        self.evicted.add(first, end)
        self._sweep()

    def _sweep(self) -> None:
        for first, end in self.evicted:
            self.slots.free(first, min(end, self.written))

    def slide(self, length: int) -> None:
        """Evicts what is behind the window of the last of `length` tokens."""
        if self.window is not None:
            sink, recent = self.window
            if length - 1 - recent > sink:
                self.evict(sink, length - 1 - recent)

    def trim(self, length: int) -> None:
        """Forgets the tokens from `length` on."""
        self.written = max(0, min(self.written, length - 1))
        for ranges in (self.hidden, self.evicted):
            ranges.remove(length, self.model.max_context)
        self.slots.cut(length)

    def fork_into(self, other: KvCache) -> None:
        """Fills an empty cache with the same. What was queued here must have been carried out."""
        other.written, other.window = self.written, self.window
        other.hidden, other.evicted = Ranges(iter(self.hidden)), Ranges(iter(self.evicted))
        other.slots = self.slots.share_with(other.queue, self.written)

    def restart(self) -> None:
        """After an error: gives everything back; what is needed of it is computed again, from the
        tokens that are not evicted."""
        self.queue.destroy()
        self.prefilled()
        self.written = 0
        self._out = self._late = None
        with contextlib.suppress(InferletError):  # the connection may be gone
            self.queue = Queue(self.model)
            self.slots = Slots(self.queue)
