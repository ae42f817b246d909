"""The ABI carried out one command after the other: what `docs/abi.md` says, and nothing else.

No steps, no pipelining, no page tables, no device. The toy model of `toy_device` stands in: a
hidden state is a checksum of what its input attended to. `Reference.run` says what the answer has
to be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from inferlet import abi
from inferlet import errors as e

from .sequential_memory import STOPPED, Memory, Slot, Vector, overlap
from .toy_device import (
    VECTOR_BYTES,
    Attended,
    Control,
    choose,
    distribution,
    embedding,
    finite,
    log_probability,
    vector,
)

MAX_CONTEXT = 512
FREEING = abi.DeallocKvPage | abi.DeallocEmb | abi.DeallocToken | abi.DeallocHistory


@dataclass
class Expected:
    """A value, or one of some error codes, or the very error of an earlier request. `ring`:
    (offset, octets) that ring out holds then."""

    value: Any = None
    ring: tuple[int, bytes] | None = None
    codes: frozenset[int] = frozenset()
    like: int | None = None


@dataclass
class Reference(Memory):
    """`ring_in` is for the caller to set. `spoilt`: a command failed over what its ring in held;
    what those behind it on its queue were to fill may be as before, or unwritten."""

    ring_in: bytes = b""
    spoilt: bool = False

    def run(self, c: Any) -> Expected:
        """Carries out a command of an open queue."""
        queue = self.queues[c.queue]
        if isinstance(c, abi.Synchronize):
            failed, queue.failed = queue.failed, None
            return Expected(like=failed)
        if queue.failed is not None and not isinstance(c, FREEING):
            return Expected(like=queue.failed)
        wrong: set[type[e.InferletError]] = set()
        self._ring: tuple[int, bytes] | None = None
        value = getattr(self, f"_{type(c).__name__.lower()}")(c, wrong)
        if not wrong:
            return Expected(value, self._ring)
        if queue.failed is None:
            queue.failed = c.req
        return Expected(codes=frozenset(kind.code for kind in wrong))

    # --- vectors --------------------------------------------------------------

    def _vectors_at(
        self, span: abi.Span, offset: int, size: int, wrong: set[type[e.InferletError]]
    ) -> list[Any]:
        if span[2] == 0:
            wrong.add(e.SpanError)
        if offset % 4 or offset + VECTOR_BYTES * span[2] > size:
            wrong.add(e.ArgumentError)
        return self._embeds(span, wrong)

    def _reademb(self, c: abi.ReadEmb, wrong: set[type[e.InferletError]]) -> int | None:
        entries = self._vectors_at(c.emb, c.offset, self.limits.ring_bytes, wrong)
        if None in entries:
            wrong.add(e.UnwrittenError)
        if wrong or STOPPED in entries:
            return None
        parts = [x.data if isinstance(x, Vector) else embedding(x[1]) for x in entries]
        self._ring = (c.offset, b"".join(parts))
        return len(parts)

    def _writeemb(self, c: abi.WriteEmb, wrong: set[type[e.InferletError]]) -> None:
        self._vectors_at(c.target, c.offset, self.limits.ring_in_bytes, wrong)
        handle, first, count = c.target
        positions = self._positions(c.positions, count, wrong)
        data = self.ring_in[c.offset : c.offset + count * VECTOR_BYTES]
        if not wrong and not finite(data):
            self.spoilt = True
            wrong.add(e.ArgumentError)
        if not wrong:
            self.embs[handle].entries[first : first + count] = [
                Vector(position, data[i * VECTOR_BYTES : (i + 1) * VECTOR_BYTES])
                for i, position in enumerate(positions)
            ]

    def _positions(
        self, given: int | list[int], count: int, wrong: set[type[e.InferletError]]
    ) -> list[int]:
        positions = [given + i for i in range(count)] if isinstance(given, int) else given
        if len(positions) != count or max(positions, default=0) >= MAX_CONTEXT:
            wrong.add(e.PositionError)
        return positions

    # --- the model ------------------------------------------------------------

    def _embedtxt(self, c: abi.EmbedTxt, wrong: set[type[e.InferletError]]) -> None:
        count = len(c.tokens)
        if not count:
            wrong.add(e.ArgumentError)
        self._embeds((*c.target, count), wrong)
        positions = self._positions(c.positions, count, wrong)
        values = []
        for token in c.tokens:
            if token >= self.vocab:
                wrong.add(e.ArgumentError)
            if token < 0 and ~token not in self.tokens:
                wrong.add(e.UnwrittenError)
            elif not wrong:
                values.append(token if token >= 0 else self.tokens[~token][1])
        if not wrong:
            handle, first = c.target
            self.embs[handle].entries[first : first + count] = [
                v if v is STOPPED else (p, v) for p, v in zip(positions, values, strict=True)
            ]

    def _forward(self, c: abi.Forward, wrong: set[type[e.InferletError]]) -> None:
        inputs, n = self._embeds(c.inputs, wrong), c.inputs[2]
        if not n:
            wrong.add(e.SpanError)
        if None in inputs:
            wrong.add(e.UnwrittenError)
        reads = [slot for span in c.reads if span[2] for slot in self._slots(span, wrong)]
        if sum(span[2] for span in c.reads) > self.limits.kv_pages * self.page:
            wrong.add(e.QuotaError)
        target: list[Slot] = []
        if c.write is not None:
            target = self._slots(c.write, wrong, write=True)
            same = [span for span in c.reads if span[0] == c.write[0] and span[2]]
            if c.write[2] != n or any(overlap(span, c.write) for span in same):
                wrong.add(e.SpanError)
        if c.outputs is not None:
            self._embeds(c.outputs, wrong)
            handle, first, length = c.outputs
            tail = first + length == c.inputs[1] + n
            if length > n or (handle == c.inputs[0] and overlap(c.outputs, c.inputs) and not tail):
                wrong.add(e.SpanError)
        if c.positions is not None and (
            len(c.positions) != n or max(c.positions, default=0) >= MAX_CONTEXT
        ):
            wrong.add(e.PositionError)
        width = (len(reads) + n + 7) // 8
        if c.mask is not None and len(c.mask) != n * width:
            wrong.add(e.MaskError)
        if wrong:
            return
        hidden: list[Any] = [STOPPED] * n
        if STOPPED not in inputs:
            pairs = [(x.position, x.data) if isinstance(x, Vector) else x for x in inputs]
            if c.positions is not None:
                pairs = [(p, item) for p, (_, item) in zip(c.positions, pairs, strict=True)]
            for slot, pair in zip(target, pairs, strict=False):
                slot.written, slot.visible = pair, True
            columns = reads + [Slot(pair) for pair in pairs]
            for i, (p, _) in enumerate(pairs):
                row = None if c.mask is None else c.mask[i * width : (i + 1) * width]
                hidden[i] = Vector(p, vector(_seen(columns, p, row)))
        if c.outputs is not None and c.outputs[2]:
            handle, first, length = c.outputs
            self.embs[handle].entries[first : first + length] = hidden[-length:]

    def _output(self, index: abi.Index, wrong: set[type[e.InferletError]]) -> Any:
        entry = (self._embeds((*index, 1), wrong) or [None])[0]
        if not wrong and not isinstance(entry, Vector) and entry is not STOPPED:
            wrong.add(e.UnwrittenError)
        return entry

    def _sample(self, c: abi.Sample, wrong: set[type[e.InferletError]]) -> Any:
        entry = self._output(c.emb, wrong)
        if c.token not in self.tokens and len(self.tokens) >= self.limits.tokens:
            wrong.add(e.QuotaError)
        if c.mask is not None and c.mask + (self.vocab + 7) // 8 > self.limits.ring_in_bytes:
            wrong.add(e.ArgumentError)
        if any(t >= self.vocab or not math.isfinite(value) for t, value in c.bias):
            wrong.add(e.ArgumentError)
        if c.history is not None and c.history not in self.histories:
            wrong.add(e.HandleError)
        if c.history is not None and self.history_held >= self.limits.history:
            wrong.add(e.QuotaError)
        if c.k:
            self._check_dist(c, wrong)
        if wrong:
            return None
        if entry is STOPPED:
            self.tokens[c.token] = (c.queue, STOPPED)
            return None
        value = self.choose(c, entry)
        if value is None:
            self.spoilt = True
            wrong.add(e.MaskError)
            return None
        self.tokens[c.token] = (c.queue, STOPPED if value in c.stop else value)
        if c.history is not None and value not in c.stop:
            self.histories[c.history].added.append(value)
        if not (c.logprobs or c.k):
            return value
        count = self._write_dist(c, entry) if c.k else 0
        return [value, log_probability(entry.data, value, self.vocab), count]

    def choose(self, c: abi.Sample, entry: Vector) -> int | None:
        """The token of a sample that is right so far; None if its mask allows none."""
        control = Control(bias=c.bias)
        if c.mask is not None:
            control.mask = self.ring_in[c.mask : c.mask + (self.vocab + 7) // 8]
        if c.history is not None:
            past = self.histories[c.history]
            control.prompt, control.added = past.prompt, past.added
            control.repetition = c.repetition_penalty
            control.presence, control.frequency = c.presence_penalty, c.frequency_penalty
        return choose(entry.data, self.vocab, control)

    def _check_dist(
        self, c: abi.GetNextDist | abi.Sample, wrong: set[type[e.InferletError]]
    ) -> None:
        n = min(c.k, self.vocab)
        if not 0 < n <= self.limits.top_k:
            wrong.add(e.ArgumentError)
        if c.offset % 4 or c.offset + 8 * n > self.limits.ring_bytes:
            wrong.add(e.ArgumentError)

    def _write_dist(self, c: abi.GetNextDist | abi.Sample, entry: Vector) -> int:
        n = min(c.k, self.vocab)
        self._ring = (c.offset, distribution(entry.data, n, self.vocab))
        return n

    def _getnextdist(self, c: abi.GetNextDist, wrong: set[type[e.InferletError]]) -> int | None:
        self._check_dist(c, wrong)
        entry = self._output(c.emb, wrong)
        return None if wrong or entry is STOPPED else self._write_dist(c, entry)


def _seen(columns: list[Slot], position: int, row: bytes | None) -> Attended:
    seen = []
    for i, slot in enumerate(columns):
        if slot.written is None:
            continue
        if row is None:
            attends = slot.visible and slot.written[0] <= position
        else:
            attends = bool(row[i // 8] >> (i % 8) & 1)
        if attends:
            seen.append(slot.written)
    return tuple(seen)
