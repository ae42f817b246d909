"""What programs hold, and the commands on it alone: the part of `sequential.py` without a model."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from inferlet import abi
from inferlet import errors as e


class Dropped(enum.Enum):
    STOPPED = "stopped"


STOPPED = Dropped.STOPPED


@dataclass
class Slot:
    written: tuple[int, int | bytes] | None = None  # position, token or vector
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
    entries: list[Any]  # None: unwritten; (position, token); Vector; STOPPED


@dataclass(frozen=True)
class Vector:
    position: int
    data: bytes


@dataclass
class Past:
    """A history."""

    queue: int
    prompt: list[int]
    added: list[int] = field(default_factory=list)


@dataclass
class QueueState:
    failed: int | None = None  # request id of the command whose error stopped it


@dataclass
class Memory:
    limits: abi.Limits
    page: int
    vocab: int
    queues: dict[int, QueueState] = field(default_factory=dict)
    kvs: dict[int, Kv] = field(default_factory=dict)
    embs: dict[int, Emb] = field(default_factory=dict)
    tokens: dict[int, tuple[int, Any]] = field(default_factory=dict)  # queue; id or STOPPED
    histories: dict[int, Past] = field(default_factory=dict)

    def destroy(self, queue: int) -> None:
        for kv in [h for h, kv in self.kvs.items() if kv.queue == queue]:
            self._free(self.kvs.pop(kv).pages)
        self.embs = {h: emb for h, emb in self.embs.items() if emb.queue != queue}
        self.tokens = {h: t for h, t in self.tokens.items() if t[0] != queue}
        self.histories = {h: p for h, p in self.histories.items() if p.queue != queue}
        del self.queues[queue]

    @property
    def pages_held(self) -> int:
        return sum(page is not None for kv in self.kvs.values() for page in kv.pages)

    @property
    def embeds_held(self) -> int:
        return sum(len(emb.entries) for emb in self.embs.values())

    @property
    def history_held(self) -> int:
        return sum(len(past.prompt) + len(past.added) for past in self.histories.values())

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
        same = c.source[0] == c.target[0] and overlap(c.source, c.target)
        if c.source[2] != c.target[2] or same:
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

    # --- histories ------------------------------------------------------------

    def _refs(self, refs: list[int], wrong: set[type[e.InferletError]]) -> list[int]:
        """Token ids; those of stopped tokens are left out."""
        ids = []
        for ref in refs:
            if ref >= self.vocab:
                wrong.add(e.ArgumentError)
            elif ref < 0 and ~ref not in self.tokens:
                wrong.add(e.UnwrittenError)
            else:
                ids.append(ref if ref >= 0 else self.tokens[~ref][1])
        return [token for token in ids if token is not STOPPED]

    def _allochistory(self, c: abi.AllocHistory, wrong: set[type[e.InferletError]]) -> None:
        if c.history in self.histories:
            wrong.add(e.HandleError)
        prompt = self._refs(c.prompt, wrong)
        if self.history_held + len(prompt) > self.limits.history:
            wrong.add(e.QuotaError)
        if not wrong:
            self.histories[c.history] = Past(c.queue, prompt)

    def _extendhistory(self, c: abi.ExtendHistory, wrong: set[type[e.InferletError]]) -> None:
        if c.history not in self.histories:
            wrong.add(e.HandleError)
        tokens = self._refs(c.tokens, wrong)
        if self.history_held + len(tokens) > self.limits.history:
            wrong.add(e.QuotaError)
        if not wrong:
            self.histories[c.history].added += tokens

    def _deallochistory(self, c: abi.DeallocHistory, wrong: set[type[e.InferletError]]) -> None:
        if self.histories.pop(c.history, None) is None:
            wrong.add(e.HandleError)


def overlap(a: abi.Span, b: abi.Span) -> bool:
    return a[1] < b[1] + b[2] and b[1] < a[1] + a[2]
