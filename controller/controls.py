"""Queued commands that the controller carries out by itself, without the device."""

from __future__ import annotations

from inferlet import abi
from inferlet.errors import (
    ArgumentError,
    HandleError,
    OutOfMemoryError,
    QuotaError,
    SpanError,
)

from .exports import export_kvpage, import_kvpage
from .forward import embeds, kv_block, positions_of
from .histories import alloc_history, dealloc_history, extend_history, late_bound
from .run import Handler, Run, synchronize
from .seat import unused
from .tables import EmbBlock, Entry, KvBlock


def alloc_kvpage(run: Run, c: abi.AllocKvPage) -> bool:
    seat, machine, pool = run.seat, run.machine, run.machine.pages
    unused(seat.kvs, c.kv, "kv")
    if c.pages == 0:
        raise ArgumentError("alloc_kvpage of 0 pages", "ask for at least one")
    seat.check_pages(c.pages)
    if pool.free < c.pages:
        held = seat.distinct_pages()
        if held + c.pages > pool.total:
            raise OutOfMemoryError(
                f"{c.pages} KV pages beside the {held} held; this server has {pool.total} in all",
                "ask for fewer, or serve with more --kv-pages",
            )
    if not machine.swapping.has_pages(run, c.pages):
        return False
    if not run.has_turn(c.pages):
        return False
    pages = pool.take(c.pages)
    seat.pages_held += c.pages
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
    if not run.has_turn(end - c.first_page):
        return False
    if block in run.read:
        run.linger(block, c.first_page, end)
    if c.first_page == 0 and c.pages is None:
        run.machine.free_kv(run.seat, run.seat.kvs.pop(c.kv))
    else:
        run.machine.free_pages(run.seat, block, c.first_page, end)
    run.answer(c.req, None)
    return True


def share_kvpage(run: Run, c: abi.ShareKvPage) -> bool:
    seat, pool, size = run.seat, run.machine.pages, run.machine.model.page_size
    unused(seat.kvs, c.kv, "kv")
    if c.pages == 0:
        raise ArgumentError("share_kvpage of 0 pages", "share at least one")
    source = kv_block(seat, (c.source, c.first_page * size, c.pages * size), "source")
    seat.check_pages(c.pages)
    if not (run.settled(source) and run.has_turn(c.pages)):
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
    unused(seat.embs, c.emb, "emb")
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
    positions = positions_of(c.positions, count, model.max_context)
    if max(tokens) >= model.vocab_size:
        raise ArgumentError(
            f"token id {max(tokens)}; the vocabulary has {model.vocab_size}",
            "take ids from tokenize or get_vocabs",
        )
    entries: list[Entry] = [t if t >= 0 else late_bound(seat, ~t) for t in tokens]
    run.machine.set_entries(emb, first, entries, positions)
    run.answer(c.req, None)
    return True


CONTROLS: dict[type[abi.Command], Handler] = {
    abi.AllocKvPage: alloc_kvpage,
    abi.DeallocKvPage: dealloc_kvpage,
    abi.ShareKvPage: share_kvpage,
    abi.AllocEmb: alloc_emb,
    abi.DeallocEmb: dealloc_emb,
    abi.DeallocToken: dealloc_token,
    abi.AllocHistory: alloc_history,
    abi.ExtendHistory: extend_history,
    abi.DeallocHistory: dealloc_history,
    abi.EmbedTxt: embed_txt,
    abi.ExportKvPage: export_kvpage,
    abi.ImportKvPage: import_kvpage,
    abi.Synchronize: synchronize,
}
