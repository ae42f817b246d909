"""The ABI carried out one command after the other: what `docs/abi.md` says, and nothing else.

No steps, no pipelining, no page tables, no device. The toy model of `toy_device` stands in: a
hidden state is what its input attended to. `Reference.run` says what the answer has to be.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from inferlet import abi
from inferlet import errors as e

from .toy_device import Attended, next_token

MAX_CONTEXT = 512


class Dropped(enum.Enum):
    STOPPED = "stopped"


STOPPED = Dropped.STOPPED


@dataclass
class Slot:
    written: tuple[int, int] | None = None  # position, token
    visible: bool = True


@dataclass
class Page:
    slots: list[Slot]
    holders: int = 1


@dataclass
class Kv:
    queue: int
    pages: list[Page | None]  # None: freed


@dataclass
class Emb:
    queue: int
    entries: list[Any]  # None: unwritten; (position, token); Attended as {"seen": ...}; STOPPED


@dataclass
class QueueState:
    failed: int | None = None  # request id of the command whose error stopped it


@dataclass
class Expected:
    """A value, or one of some error codes, or the very error of an earlier request."""

    value: Any = None
    codes: frozenset[int] = frozenset()
    like: int | None = None


@dataclass
class Reference:
    limits: abi.Limits
    page: int
    vocab: int
    queues: dict[int, QueueState] = field(default_factory=dict)
    kvs: dict[int, Kv] = field(default_factory=dict)
    embs: dict[int, Emb] = field(default_factory=dict)
    tokens: dict[int, tuple[int, Any]] = field(default_factory=dict)  # queue; id or STOPPED

    def run(self, c: Any) -> Expected:
        """Carries out a command of an open queue."""
        queue = self.queues[c.queue]
        if isinstance(c, abi.Synchronize):
            failed, queue.failed = queue.failed, None
            return Expected(like=failed)
        freeing = isinstance(c, abi.DeallocKvPage | abi.DeallocEmb | abi.DeallocToken)
        if queue.failed is not None and not freeing:
            return Expected(like=queue.failed)
        wrong: set[type[e.InferletError]] = set()
        value = getattr(self, f"_{type(c).__name__.lower()}")(c, wrong)
        if not wrong:
            return Expected(value)
        if queue.failed is None:
            queue.failed = c.req
        return Expected(codes=frozenset(kind.code for kind in wrong))

    def destroy(self, queue: int) -> None:
        for kv in [h for h, kv in self.kvs.items() if kv.queue == queue]:
            self._free(self.kvs.pop(kv).pages)
        self.embs = {h: emb for h, emb in self.embs.items() if emb.queue != queue}
        self.tokens = {h: t for h, t in self.tokens.items() if t[0] != queue}
        del self.queues[queue]

    @property
    def pages_held(self) -> int:
        return sum(page is not None for kv in self.kvs.values() for page in kv.pages)

    @property
    def embeds_held(self) -> int:
        return sum(len(emb.entries) for emb in self.embs.values())

    # --- memory ---------------------------------------------------------------

    def _quota(self, pages: int, wrong: set[type[e.InferletError]]) -> None:
        cap = self.limits.kv_pages
        if self.pages_held + pages > cap or len(self.kvs) >= cap:
            wrong.add(e.QuotaError)

    def _allockvpage(self, c: abi.AllocKvPage, wrong: set[type[e.InferletError]]) -> None:
        if c.kv in self.kvs:
            wrong.add(e.HandleError)
        if c.pages == 0:
            wrong.add(e.ArgumentError)
        self._quota(c.pages, wrong)
        if not wrong:
            pages = [Page([Slot() for _ in range(self.page)]) for _ in range(c.pages)]
            self.kvs[c.kv] = Kv(c.queue, [*pages])

    def _free(self, pages: list[Page | None]) -> None:
        for page in pages:
            if page is not None:
                page.holders -= 1

    def _deallockvpage(self, c: abi.DeallocKvPage, wrong: set[type[e.InferletError]]) -> None:
        if c.kv not in self.kvs:
            wrong.add(e.HandleError)
            return
        pages = self.kvs[c.kv].pages
        end = len(pages) if c.pages is None else c.first_page + c.pages
        if end > len(pages) or c.first_page > end:
            wrong.add(e.SpanError)
            return
        self._free(pages[c.first_page : end])
        pages[c.first_page : end] = [None] * (end - c.first_page)
        if c.first_page == 0 and c.pages is None:
            del self.kvs[c.kv]

    def _sharekvpage(self, c: abi.ShareKvPage, wrong: set[type[e.InferletError]]) -> None:
        if c.kv in self.kvs:
            wrong.add(e.HandleError)
        if c.pages == 0:
            wrong.add(e.ArgumentError)
        self._slots((c.source, c.first_page * self.page, c.pages * self.page), wrong)
        self._quota(c.pages, wrong)
        if not wrong:
            pages = self.kvs[c.source].pages[c.first_page : c.first_page + c.pages]
            for page in pages:
                assert page is not None
                page.holders += 1
            self.kvs[c.kv] = Kv(c.queue, pages)

    def _slots(
        self, span: abi.Span, wrong: set[type[e.InferletError]], write: bool = False
    ) -> list[Slot]:
        handle, first, length = span
        if handle not in self.kvs:
            wrong.add(e.HandleError)
            return []
        pages = self.kvs[handle].pages
        if first + length > len(pages) * self.page:
            wrong.add(e.SpanError)
            return []
        slots = []
        for i in range(first, first + length):
            page = pages[i // self.page]
            if page is None:
                wrong.add(e.SpanError)
                return []
            if write and page.holders > 1:
                wrong.add(e.SharedPageError)
            slots.append(page.slots[i % self.page])
        return slots

    def _copykvpage(self, c: abi.CopyKvPage, wrong: set[type[e.InferletError]]) -> None:
        source, target = self._slots(c.source, wrong), self._slots(c.target, wrong, write=True)
        overlap = c.source[0] == c.target[0] and _overlap(c.source, c.target)
        if c.source[2] != c.target[2] or overlap:
            wrong.add(e.SpanError)
        if not wrong:
            for a, b in zip(source, target, strict=True):
                b.written, b.visible = a.written, a.visible

    def _maskkvpage(self, c: abi.MaskKvPage, wrong: set[type[e.InferletError]]) -> None:
        slots = self._slots(c.span, wrong, write=True)
        if not wrong:
            for slot in slots:
                slot.visible = c.visible

    def _allocemb(self, c: abi.AllocEmb, wrong: set[type[e.InferletError]]) -> None:
        if c.emb in self.embs:
            wrong.add(e.HandleError)
        if c.count == 0:
            wrong.add(e.ArgumentError)
        if self.embeds_held + c.count > self.limits.embeds:
            wrong.add(e.QuotaError)
        if not wrong:
            self.embs[c.emb] = Emb(c.queue, [None] * c.count)

    def _deallocemb(self, c: abi.DeallocEmb, wrong: set[type[e.InferletError]]) -> None:
        if self.embs.pop(c.emb, None) is None:
            wrong.add(e.HandleError)

    def _dealloctoken(self, c: abi.DeallocToken, wrong: set[type[e.InferletError]]) -> None:
        if self.tokens.pop(c.token, None) is None:
            wrong.add(e.HandleError)

    def _embeds(self, span: abi.Span, wrong: set[type[e.InferletError]]) -> list[Any]:
        handle, first, length = span
        if handle not in self.embs:
            wrong.add(e.HandleError)
            return []
        entries = self.embs[handle].entries
        if first + length > len(entries):
            wrong.add(e.SpanError)
        return entries[first : first + length]

    # --- the model ------------------------------------------------------------

    def _embedtxt(self, c: abi.EmbedTxt, wrong: set[type[e.InferletError]]) -> None:
        count = len(c.tokens)
        if not count:
            wrong.add(e.ArgumentError)
        self._embeds((*c.target, count), wrong)
        where = c.positions
        positions = [where + i for i in range(count)] if isinstance(where, int) else where
        if len(positions) != count or max(positions, default=0) >= MAX_CONTEXT:
            wrong.add(e.PositionError)
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
        if any(x is None or isinstance(x, dict) for x in inputs):
            wrong.add(e.UnwrittenError)
        reads = [slot for span in c.reads if span[2] for slot in self._slots(span, wrong)]
        if sum(span[2] for span in c.reads) > self.limits.kv_pages * self.page:
            wrong.add(e.QuotaError)
        target: list[Slot] = []
        if c.write is not None:
            target = self._slots(c.write, wrong, write=True)
            same = [span for span in c.reads if span[0] == c.write[0] and span[2]]
            if c.write[2] != n or any(_overlap(span, c.write) for span in same):
                wrong.add(e.SpanError)
        if c.outputs is not None:
            self._embeds(c.outputs, wrong)
            handle, first, length = c.outputs
            tail = first + length == c.inputs[1] + n
            if length > n or (handle == c.inputs[0] and _overlap(c.outputs, c.inputs) and not tail):
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
            own = [p for p, _ in inputs] if c.positions is None else c.positions
            texts = [(p, t) for p, (_, t) in zip(own, inputs, strict=True)]
            for slot, text in zip(target, texts, strict=False):
                slot.written, slot.visible = text, True
            columns = reads + [Slot(text) for text in texts]
            for i, (p, _) in enumerate(texts):
                row = None if c.mask is None else c.mask[i * width : (i + 1) * width]
                hidden[i] = {"seen": _seen(columns, p, row)}
        if c.outputs is not None and c.outputs[2]:
            handle, first, length = c.outputs
            self.embs[handle].entries[first : first + length] = hidden[-length:]

    def _output(self, index: abi.Index, wrong: set[type[e.InferletError]]) -> Any:
        entry = (self._embeds((*index, 1), wrong) or [None])[0]
        if not wrong and not isinstance(entry, dict) and entry is not STOPPED:
            wrong.add(e.UnwrittenError)
        return entry

    def _sample(self, c: abi.Sample, wrong: set[type[e.InferletError]]) -> int | None:
        entry = self._output(c.emb, wrong)
        if c.token not in self.tokens and len(self.tokens) >= self.limits.tokens:
            wrong.add(e.QuotaError)
        if wrong:
            return None
        if entry is STOPPED:
            self.tokens[c.token] = (c.queue, STOPPED)
            return None
        value = next_token(entry["seen"], self.vocab)
        self.tokens[c.token] = (c.queue, STOPPED if value in c.stop else value)
        return value

    def _getnextdist(self, c: abi.GetNextDist, wrong: set[type[e.InferletError]]) -> int | None:
        n = min(c.k, self.vocab)
        if not 0 < n <= self.limits.top_k:
            wrong.add(e.ArgumentError)
        if c.offset % 4 or c.offset + 8 * n > self.limits.ring_bytes:
            wrong.add(e.ArgumentError)
        entry = self._output(c.emb, wrong)
        return None if entry is STOPPED else n


def _overlap(a: abi.Span, b: abi.Span) -> bool:
    return a[1] < b[1] + b[2] and b[1] < a[1] + a[2]


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
