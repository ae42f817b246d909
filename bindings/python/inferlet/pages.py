"""KV pages and embeds: made, shared, copied, hidden and freed (Pie, SOSP'25: Allocate)."""

from __future__ import annotations

from typing import SupportsIndex

from .abi import AllocEmb, AllocKvPage, CopyKvPage, DeallocKvPage, MaskKvPage, ShareKvPage
from .checks import U32_MAX, integer
from .command_queue import CommandQueue
from .errors import SpanError
from .sampling import Token
from .spans import Embeds, EmbedsHandle, KvHandle, KvSpan, check_span


class PageCalls(CommandQueue):
    """Calls that make and free what `forward` works on."""

    def get_kvpage_size(self) -> int:
        """Slots of a KV page."""
        return self.model.page_size

    def alloc_kvpage(self, pages: int = 1) -> KvSpan:
        """`pages` new pages, as a span of all their slots. ArgumentError if fewer than 1; on the
        queue: QuotaError, OutOfMemoryError."""
        return self.alloc_kv(_count("the number of pages", pages) * self.model.page_size)

    def alloc_kv(self, slots: int) -> KvSpan:
        """As many new pages as `slots` slots need, as a span of exactly `slots`."""
        count = _count("the number of slots", slots)
        pages = -(-count // self.model.page_size)
        handle = KvHandle(self, pages)
        self._connection.append(AllocKvPage(None, self.number, handle.number, pages))
        return KvSpan(handle, 0, count)

    def alloc_emb(self, count: int = 1) -> Embeds:
        """`count` new embeds. ArgumentError if fewer than 1; on the queue: QuotaError."""
        embeds = _count("the number of embeds", count)
        handle = EmbedsHandle(self)
        self._connection.append(AllocEmb(None, self.number, handle.number, embeds))
        return Embeds(handle, 0, embeds)

    def dealloc_kvpage(self, kv: KvSpan) -> None:
        """Lets go of the pages that `kv` covers; their memory is free once no other handle holds
        them. SpanError if it does not begin at a page's first slot."""
        first, pages = self._pages(kv)
        handle = kv.handle
        if isinstance(handle, KvHandle) and pages == handle.pages:
            handle.free()
        else:
            self._connection.append(DeallocKvPage(None, self.number, handle.number, first, pages))

    def dealloc_emb(self, emb: Embeds) -> None:
        """Frees the whole handle that `emb` is a part of."""
        check_span(emb, Embeds).handle.free()

    def dealloc_token(self, token: Token) -> None:
        """Frees the handle of a late-bound token; its value, once known, stays."""
        token.handle.free()

    def share_kvpage(self, kv: KvSpan) -> KvSpan:
        """A new handle for the pages that `kv` covers. Both can be read; a write into a page that
        two handles hold fails with SharedPageError. SpanError if it does not begin at a page."""
        first, pages = self._pages(kv)
        source = kv.handle.number
        handle = KvHandle(self, pages)
        self._connection.append(ShareKvPage(None, self.number, handle.number, source, first, pages))
        return KvSpan(handle, 0, len(kv))

    def copy_kvpage(self, source: KvSpan, target: KvSpan) -> None:
        """Copies slot by slot: keys, values, position, visible bit. On the queue: SpanError if
        the lengths differ."""
        from_, to = check_span(source, KvSpan).wire, check_span(target, KvSpan).wire
        self._connection.append(CopyKvPage(None, self.number, from_, to))

    def mask_kvpage(self, kv: KvSpan, visible: bool) -> None:
        """Hides the slots of `kv` from attention, or shows them again."""
        span = check_span(kv, KvSpan).wire
        self._connection.append(MaskKvPage(None, self.number, span, bool(visible)))

    def _pages(self, kv: KvSpan) -> tuple[int, int]:
        """(first page, number of pages) of `kv` in its handle."""
        size = self.model.page_size
        if check_span(kv, KvSpan).first % size or not len(kv):
            raise SpanError(
                f"the span begins at slot {kv.first} and has {len(kv)} slots; "
                f"a page has {size} slots",
                "begin at a multiple of the page size",
            )
        return kv.first // size, -(-len(kv) // size)


def _count(name: str, value: SupportsIndex) -> int:
    return integer(name, value, U32_MAX, "1 or more", least=1)
