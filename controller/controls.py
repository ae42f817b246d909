"""Queued commands that the controller carries out by itself, without the device."""

from __future__ import annotations

from collections.abc import Mapping

from inferlet import abi
from inferlet.errors import (
    ArgumentError,
    HandleError,
    OutOfMemoryError,
    PositionError,
    QuotaError,
    SpanError,
    UnwrittenError,
)

from .forward import check_positions, embeds, kv_block
from .run import Handler, Run, synchronize
from .seat import Seat
from .tables import EmbBlock, Entry, KvBlock, Late


def alloc_kvpage(run: Run, c: abi.AllocKvPage) -> bool:
    seat, machine, pool = run.seat, run.machine, run.machine.pages
    _unused(seat.kvs, c.kv, "kv")
    if c.pages == 0:
        raise ArgumentError("alloc_kvpage of 0 pages", "ask for at least one")
    _page_quota(seat, c.pages)
    if seat.pages_owned + c.pages > pool.total:
        raise OutOfMemoryError(
            f"{c.pages} KV pages beside the {seat.pages_owned} held; this server has "
            f"{pool.total} in all",
            "ask for fewer, or serve with more --kv-pages",
        )
    if pool.free < c.pages and not machine.make_room(c.pages, seat):
        return False
    if pool.available < c.pages and not run.builder.has_work:
        pool.settle()  # no call of the open step can still look at them
    if pool.available < c.pages:
        return False  # freed in this very step: the next one has them
    pages = pool.take(c.pages)
    seat.pages_held += c.pages
    seat.pages_owned += c.pages
    seat.kvs[c.kv] = KvBlock(run.queue, pages, machine.model.page_size)
    run.builder.clear_pages(pages)
    run.answer(c.req, None)
    return True


def dealloc_kvpage(run: Run, c: abi.DeallocKvPage) -> bool:
    block = run.seat.kvs.get(c.kv)
    if block is None:
        raise HandleError(f"no kv has handle {c.kv}", "free it once")
    end = len(block.pages) if c.pages is None else c.first_page + c.pages
    if end > len(block.pages) or c.first_page > end:
        raise SpanError(
            f"pages {c.first_page} to {end} of a handle of {len(block.pages)}",
            "free only what it holds",
        )
    if block in run.read and any(p >= 0 and run.machine.pages.shared(p) for p in block.pages):
        run.lingering = max(run.lingering, run.read[block])
    if c.first_page == 0 and c.pages is None:
        run.machine.free_kv(run.seat, run.seat.kvs.pop(c.kv))
    else:
        run.machine.free_pages(run.seat, block, c.first_page, end)
    run.answer(c.req, None)
    return True


def share_kvpage(run: Run, c: abi.ShareKvPage) -> bool:
    seat, pool, size = run.seat, run.machine.pages, run.machine.model.page_size
    _unused(seat.kvs, c.kv, "kv")
    if c.pages == 0:
        raise ArgumentError("share_kvpage of 0 pages", "share at least one")
    source = kv_block(seat, (c.source, c.first_page * size, c.pages * size), "source")
    _page_quota(seat, c.pages)
    if not run.settled(source):
        return False
    pages = source.pages[c.first_page : c.first_page + c.pages]
    for page in pages:
        pool.retain(page)
    seat.pages_held += c.pages
    block = KvBlock(run.queue, pages, size)
    block.regular = source.regular
    block.base = source.base + c.first_page * size
    block.filled = max(0, min(source.filled - c.first_page * size, c.pages * size))
    seat.kvs[c.kv] = block
    for touched in (run.read, run.written):  # the same pages, so the same conflicts
        if source in touched:
            touched[block] = touched[source]
    run.answer(c.req, None)
    return True


def alloc_emb(run: Run, c: abi.AllocEmb) -> bool:
    seat = run.seat
    _unused(seat.embs, c.emb, "emb")
    if c.count == 0:
        raise ArgumentError("alloc_emb of 0 embeds", "ask for at least one")
    if seat.embeds_held + c.count > seat.limits.embeds:
        raise QuotaError(
            f"{c.count} embeds more than the {seat.embeds_held} held; the cap is "
            f"{seat.limits.embeds}",
            "free embeds first, fill long prompts in parts, or raise --quota embeds",
        )
    seat.embeds_held += c.count
    seat.embs[c.emb] = EmbBlock(run.queue, c.count)
    run.answer(c.req, None)
    return True


def dealloc_emb(run: Run, c: abi.DeallocEmb) -> bool:
    emb = run.seat.embs.pop(c.emb, None)
    if emb is None:
        raise HandleError(f"no emb has handle {c.emb}", "free it once")
    run.machine.free_emb(run.seat, emb)
    run.answer(c.req, None)
    return True


def dealloc_token(run: Run, c: abi.DeallocToken) -> bool:
    if run.seat.tokens.pop(c.token, None) is None:
        raise HandleError(f"no token has handle {c.token}", "free it once")
    run.answer(c.req, None)
    return True


def embed_txt(run: Run, c: abi.EmbedTxt) -> bool:
    seat, model, tokens = run.seat, run.machine.model, c.tokens
    handle, first = c.target
    count = len(tokens)
    if count == 0:
        raise ArgumentError("embed_txt of no tokens", "give at least one")
    emb = embeds(seat, (handle, first, count), "target")
    if isinstance(c.positions, int):
        positions = list(range(c.positions, c.positions + count))
    else:
        positions = c.positions
        if len(positions) != count:
            raise PositionError(
                f"{len(positions)} positions for {count} tokens", "give one for each token"
            )
    check_positions(max(positions), model.max_context)
    if max(tokens) >= model.vocab_size:
        raise ArgumentError(
            f"token id {max(tokens)}; the vocabulary has {model.vocab_size}",
            "take ids from tokenize or get_vocabs",
        )
    entries: list[Entry] = [t if t >= 0 else _token(seat, ~t) for t in tokens]
    run.machine.set_entries(emb, first, entries)
    emb.positions[first : first + count] = positions
    run.answer(c.req, None)
    return True


def _token(seat: Seat, handle: int) -> Entry:
    late = seat.tokens.get(handle)
    if late is None or late.lost:
        raise UnwrittenError(f"no token was sampled under handle {handle}", "sample it first")
    return late if late.dead or late.value is None else late.value


def _unused(table: Mapping[int, KvBlock | EmbBlock | Late], handle: int, kind: str) -> None:
    if handle in table:
        raise HandleError(f"{kind} handle {handle} is in use", "free it first, or choose another")


def _page_quota(seat: Seat, pages: int) -> None:
    if len(seat.kvs) >= seat.limits.kv_pages:  # those with no page left take memory too
        raise QuotaError(
            f"{len(seat.kvs)} kv handles are open; the cap is {seat.limits.kv_pages}",
            "free handles done with as a whole",
        )
    if seat.pages_held + pages > seat.limits.kv_pages:
        raise QuotaError(
            f"{pages} KV pages more than the {seat.pages_held} held; the cap is "
            f"{seat.limits.kv_pages}",
            "free pages first, or launch with a larger --quota kv_pages",
        )


CONTROLS: dict[type[abi.Command], Handler] = {
    abi.AllocKvPage: alloc_kvpage,
    abi.DeallocKvPage: dealloc_kvpage,
    abi.ShareKvPage: share_kvpage,
    abi.AllocEmb: alloc_emb,
    abi.DeallocEmb: dealloc_emb,
    abi.DeallocToken: dealloc_token,
    abi.EmbedTxt: embed_txt,
    abi.Synchronize: synchronize,
}
