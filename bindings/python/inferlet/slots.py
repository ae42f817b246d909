"""The KV slots of a context: which pages hold them, which of those others may hold too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .spans import KvSpan

if TYPE_CHECKING:
    from .queue import Queue


class Slots:
    """Slot i is that of token i. Pages that were freed leave a hole; what is written is written
    behind everything else, so only there are pages added or made this context's own."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._size = queue.model.page_size
        self._parts: list[tuple[int, KvSpan]] = []  # (first slot, whole pages), ascending
        self._shared_end = 0  # slots before it are in pages that somebody else may hold

    @property
    def pages(self) -> int:
        """Pages held."""
        return sum(len(span) for _, span in self._parts) // self._size

    @property
    def shared_pages(self) -> int:
        """Pages held that a fork or an export may hold as well."""
        end = self._shared_end
        return sum(max(0, min(len(s), end - first)) for first, s in self._parts) // self._size

    @property
    def end(self) -> int:
        """Behind the last slot that has a page."""
        if not self._parts:
            return 0
        first, span = self._parts[-1]
        return first + len(span)

    def spans(self, first: int, end: int) -> list[KvSpan]:
        """The slots from `first` to `end`, holes left out."""
        spans = []
        for base, span in self._parts:
            if base >= end:
                break
            part = span[max(0, first - base) : max(0, end - base)]
            if len(part):
                spans.append(part)
        return spans

    def reserve(self, first: int, end: int) -> None:
        """Allocates pages, if there are none, for the slots from `first` to `end`, behind all that
        are held; and some more, so that there are few handles."""
        start = max(self.end, first // self._size * self._size)
        if end <= start:
            return
        model, held = self._queue.model, self.pages
        most = -(-model.max_context // self._size) - start // self._size
        spare = max(0, model.runtime.startup.limits.kv_pages - held)
        needed = -(-(end - start) // self._size)
        pages = max(needed, min(most, spare, held // 4))
        self._parts.append((start, self._queue.alloc_kvpage(pages)))

    def free(self, first: int, end: int) -> None:
        """Lets go of the pages that lie wholly between `first` and `end`."""
        size = self._size
        first, end = -(-first // size) * size, end // size * size
        if first >= end:
            return
        kept = []
        for base, span in self._parts:
            a, b = max(0, first - base), min(len(span), end - base)
            if a >= b:
                kept.append((base, span))
                continue
            self._queue.dealloc_kvpage(span[a:b])
            kept += [(base + at, part) for at, part in ((0, span[:a]), (b, span[b:])) if len(part)]
        self._parts = kept

    def cut(self, end: int) -> None:
        """Lets go of the pages that hold no slot before `end`."""
        end = -(-end // self._size) * self._size
        self.free(end, max(end, self.end))
        self._shared_end = min(self._shared_end, end)

    def unshare(self, slot: int) -> None:
        """Makes the page of `slot` this context's own, and lets go of those behind it, before
        `slot` is written."""
        if slot >= self._shared_end:
            return
        page = slot // self._size * self._size
        old = self.spans(page, slot)
        own = self._queue.alloc_kvpage(1) if old else None
        if own is not None:
            self._queue.copy_kvpage(old[0], own[: slot - page])
        self.cut(page)
        if own is not None:
            self._parts.append((page, own))

    def share(self, end: int) -> None:
        """From now on somebody else holds the pages of the slots before `end`."""
        self._shared_end = max(self._shared_end, -(-end // self._size) * self._size)

    def share_with(self, queue: Queue, end: int) -> Slots:
        """The slots before `end` for another context: its pages are these, and a copy of the last
        one if that is not full. What was queued here must have been carried out."""
        other = Slots(queue)
        whole = end // self._size * self._size
        for first, span in self._parts:
            if first < whole:
                other._parts.append((first, queue.share_kvpage(span[: whole - first])))
        other._shared_end = whole
        self.share(whole)
        if last := self.spans(whole, end):
            own = queue.alloc_kvpage(1)
            queue.copy_kvpage(last[0], own[: end - whole])
            other._parts.append((whole, own))
        return other

    def take(self, imported: KvSpan, slots: int) -> None:
        """Adds the pages of `imported` that hold its first `slots` slots; the others go."""
        kept = -(-slots // self._size) * self._size
        if kept < len(imported):
            self._queue.dealloc_kvpage(imported[kept:])
        self._parts.append((self.end, imported[:kept]))
        self.share(self.end)
