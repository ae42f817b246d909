"""A forward call made ready: handles resolved and bounds checked once, then run, maybe in chunks.

The question that decides its path is whether the attended slots are a plain page run (`paged`: the
common case, addressed by page table with no mask) or need listing slot by slot (`listed`).
"""

from __future__ import annotations

from array import array
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from inferlet.abi import Forward, Span
from inferlet.errors import (
    HandleError,
    MaskError,
    PositionError,
    QuotaError,
    SharedPageError,
    SpanError,
    TraitError,
    UnwrittenError,
)

from .packing import Input
from .tables import STOPPED, EmbBlock, Entry, Hidden, KvBlock, Late, any_dead, undecided

if TYPE_CHECKING:
    from .machine import Machine
    from .pools import PagePool
    from .seat import Seat

MAX_UNCHUNKED: Final = 512  # inputs of a forward that cannot be split

Reads = list[tuple[KvBlock, int, int]]


class Pass:
    """A forward call under way. `done` inputs have run in earlier steps."""

    __slots__ = (
        "ascending",
        "consecutive",
        "done",
        "lates",
        "mask",
        "outputs",
        "pages",
        "positions",
        "read_slots",
        "reads",
        "tokens",
        "vectors",
        "write",
    )

    def __init__(self) -> None:
        self.tokens: list[Input] = []
        self.vectors = False  # some of them are
        self.positions: list[int] = []
        self.consecutive = True  # positions go up one by one
        self.ascending = True  # they go up
        self.reads: Reads = []
        self.read_slots = 0
        self.write: tuple[KvBlock, int] | None = None
        self.outputs: tuple[EmbBlock, int, int] | None = None
        self.mask: bytes | None = None
        self.lates: tuple[Late, ...] = ()  # tokens not known yet that the inputs are or come from
        self.pages: array[int] | None = None  # the attended page run, None if listed
        self.done = 0

    @property
    def splittable(self) -> bool:
        """Its first inputs can run before the later ones: none attends to one behind it."""
        return self.mask is None and self.write is not None and self.ascending


def inputs(seat: Seat, command: Forward) -> list[Entry]:
    """What the input embeds hold. HandleError, SpanError."""
    emb = embeds(seat, command.inputs, "inputs")
    _, first, count = command.inputs
    if count == 0:
        raise SpanError("a forward without inputs", "give at least one input embed")
    return emb.entries[first : first + count]


def prepare(machine: Machine, seat: Seat, command: Forward, entries: list[Entry]) -> Pass | None:
    """Resolves and checks a forward of `entries`. None if it is dropped, its outputs then being
    stopped. It is checked all the same, so that its answer does not depend on when a stop is known.

    Raises the InferletError that says what is wrong; nothing has been changed then.
    """
    call = Pass()
    emb = embeds(seat, command.inputs, "inputs")
    count = len(entries)
    call.outputs = _outputs(seat, command, emb)
    dropped = False
    lates: dict[Late, None] = {}
    for entry in entries:
        if type(entry) is int:
            continue
        if unwritten(entry):
            raise UnwrittenError("an input embed holds nothing", "embed_txt or write_emb it first")
        if type(entry) is Hidden:
            call.vectors = True
            lates.update(dict.fromkeys(undecided(entry.lates)))
        elif type(entry) is Late and entry.value is None:
            lates[entry] = None
        dropped = dropped or stopped(entry)
    if call.vectors:
        check_trait(machine, "InputEmbed")
    call.tokens = entries  # type: ignore[assignment]
    call.lates = tuple(lates)
    call.positions = _positions(command, emb, machine.model.max_context)
    if count > 1:
        p = call.positions[0]
        call.consecutive = call.positions == list(range(p, p + count))
        call.ascending = call.consecutive or all(a < b for a, b in pairwise(call.positions))
    for span in command.reads:
        _add_read(call, seat, span)
    most = max(seat.limits.kv_pages, seat.pages_held)  # a limit set lower takes nothing away
    if call.read_slots > most * machine.model.page_size:
        raise QuotaError(
            f"a forward that reads {call.read_slots} slots, counted as often as they are named; "
            f"the cap is that of {most} pages",
            "read each slot once, or launch with a larger --quota kv_pages",
        )
    call.write = _write(call, seat, command, machine.pages)
    call.mask = _mask(call, command, count)
    if not call.splittable and count > MAX_UNCHUNKED:
        raise QuotaError(
            f"{count} inputs in a forward with a mask, without a write, or with positions that "
            f"do not go up; the most is {MAX_UNCHUNKED}",
            "split it into several forwards",
        )
    if dropped:
        if call.outputs:
            target, at, length = call.outputs
            machine.set_entries(target, at, [STOPPED] * length, call.positions[count - length :])
        return None
    call.pages = _page_run(call)
    return call


def check_again(call: Pass, seat: Seat, command: Forward, pool: PagePool) -> None:
    """A forward under way: another queue may have freed, filled or shared what it uses since.

    HandleError, SpanError, SharedPageError.
    """
    gone = not all(block.alive for block, _, _ in call.reads)
    if call.outputs and command.outputs:
        gone = gone or seat.embs.get(command.outputs[0]) is not call.outputs[0]
    if call.vectors and not gone:
        handle, start, count = command.inputs
        emb = seat.embs.get(handle)
        there = emb.entries[start + call.done : start + count] if emb else []
        waiting = call.tokens[call.done :]
        gone = len(there) != len(waiting) or any(
            type(token) is Hidden and entry is not token
            for token, entry in zip(waiting, there, strict=True)
        )
    if gone or (call.write and not call.write[0].alive):
        raise HandleError(
            "what the forward uses was freed, or its inputs filled anew, while it ran",
            "synchronize its queue before freeing or filling through another",
        )
    for block, first, length in call.reads:
        block.check(first, length, "reads")
    if call.write:
        block, first = call.write
        block.check(first, len(call.tokens), "write")
        writable(block, first, len(call.tokens), pool)


def check_trait(machine: Machine, trait: str) -> None:
    """TraitError unless the model realises it."""
    if trait not in machine.model.traits:
        raise TraitError(
            f"{machine.model.name} does not realise {trait}",
            "look at available_traits, or serve another model",
        )


def unwritten(entry: Entry) -> bool:
    """True if nothing filled the embed, or what did came to nothing."""
    return entry is None or (type(entry) is Late and entry.lost)


def stopped(entry: Entry) -> bool:
    """True if making the embed was dropped, or is sure to be."""
    if type(entry) is Late:
        return entry.doomed
    if type(entry) is Hidden:
        return any_dead(entry.lates)
    return entry is STOPPED


def embeds(seat: Seat, span: Span, what: str) -> EmbBlock:
    """The block of an embed span. HandleError, SpanError."""
    handle, first, length = span
    emb = seat.embs.get(handle)
    if emb is None:
        raise HandleError(f"{what}: no emb has handle {handle}", "alloc_emb it first")
    if first + length > len(emb.entries):
        raise SpanError(
            f"{what} reaches embed {first + length - 1}, but the handle has {len(emb.entries)}",
            "shorten the span",
        )
    return emb


def kv_block(seat: Seat, span: Span, what: str) -> KvBlock:
    """The block of a KV span. HandleError, SpanError."""
    handle, first, length = span
    block = seat.kvs.get(handle)
    if block is None:
        raise HandleError(f"{what}: no kv has handle {handle}", "alloc_kvpage it first")
    block.check(first, length, what)
    return block


def writable(block: KvBlock, first: int, length: int, pool: PagePool) -> None:
    """SharedPageError if another handle holds one of the pages."""
    size = block.page_size
    if length == 1:
        shared = pool.shared(block.pages[first // size])
    else:
        pages = block.pages[first // size : (first + length - 1) // size + 1]
        shared = any(pool.shared(page) for page in pages)
    if shared:
        raise SharedPageError(
            "a write into a page that another handle holds",
            "copy_kvpage the slots into a page of your own and write there",
        )


def _outputs(seat: Seat, command: Forward, inputs: EmbBlock) -> tuple[EmbBlock, int, int] | None:
    if command.outputs is None:
        return None
    emb = embeds(seat, command.outputs, "outputs")
    _, first, length = command.outputs
    _, start, count = command.inputs
    if length > count:
        raise SpanError(
            f"{length} outputs for {count} inputs", "ask for at most as many outputs as inputs"
        )
    own_tail = first == start + count - length
    if emb is inputs and not own_tail and first < start + count and start < first + length:
        raise SpanError(
            "the outputs overlap the inputs",
            "use other embeds, or the same ones as the last inputs",
        )
    return emb, first, length


def _positions(command: Forward, emb: EmbBlock, max_context: int) -> list[int]:
    _, first, count = command.inputs
    if command.positions is None:
        return emb.positions[first : first + count]  # checked when they were filled
    if len(command.positions) != count:
        raise PositionError(
            f"{len(command.positions)} positions for {count} inputs", "give one for each input"
        )
    check_positions(max(command.positions), max_context)
    return command.positions


def positions_of(given: int | list[int], count: int, max_context: int) -> list[int]:
    """Of `count` embeds to be filled: the first of consecutive ones, or each. PositionError."""
    if isinstance(given, int):
        positions = list(range(given, given + count))
    else:
        positions = given
        if len(positions) != count:
            raise PositionError(
                f"{len(positions)} positions for {count} embeds", "give one for each"
            )
    check_positions(max(positions), max_context)
    return positions


def check_positions(highest: int, max_context: int) -> None:
    """PositionError at or beyond the model's context."""
    if highest >= max_context:
        raise PositionError(
            f"position {highest} is beyond the model's context of {max_context}",
            "use a shorter prompt, or a window that reuses positions",
        )


def _add_read(call: Pass, seat: Seat, span: Span) -> None:
    _, first, length = span
    if length == 0:
        return
    block = kv_block(seat, span, "reads")
    if call.reads:
        last, start, n = call.reads[-1]
        if last is block and start + n == first:
            call.reads[-1] = (block, start, n + length)
            call.read_slots += length
            return
    call.reads.append((block, first, length))
    call.read_slots += length


def _write(call: Pass, seat: Seat, command: Forward, pool: PagePool) -> tuple[KvBlock, int] | None:
    if command.write is None:
        return None
    block = kv_block(seat, command.write, "write")
    _, first, length = command.write
    if length != command.inputs[2]:
        raise SpanError(
            f"the write has {length} slots for {command.inputs[2]} inputs", "make them equal"
        )
    for other, start, count in call.reads:
        if other is block and start < first + length and first < start + count:
            raise SpanError("the write overlaps the reads", "read only slots written before")
    writable(block, first, length, pool)
    return block, first


def _mask(call: Pass, command: Forward, count: int) -> bytes | None:
    if command.mask is None:
        return None
    width = (call.read_slots + count + 7) // 8
    if len(command.mask) != count * width:
        raise MaskError(
            f"a mask of {len(command.mask)} octets; {count} inputs over "
            f"{call.read_slots + count} columns need {count} rows of {width}",
            "pad each row to a whole octet",
        )
    return command.mask


def _page_run(call: Pass) -> array[int] | None:
    """The pages of the attended slots, whole call included, if they are a plain page run.

    That is: page after page from a page's first slot, holding positions that go up one by one and
    end where the inputs begin. Then input j attends simply to the first R + j + 1 slots.
    """
    if call.mask is not None or call.write is None or not call.consecutive:
        return None
    target, at = call.write
    spans = call.reads
    count = len(call.tokens)
    if spans and spans[-1][0] is target and spans[-1][1] + spans[-1][2] == at:
        spans = [*spans[:-1], (target, spans[-1][1], spans[-1][2] + count)]
    else:
        spans = [*spans, (target, at, count)]
    size, pages = target.page_size, array("i")
    expected = call.positions[0] - call.read_slots
    last = len(spans) - 1
    for i, (block, first, length) in enumerate(spans):
        if first % size or not block.regular or (i < last and length % size):
            return None
        known = length if i < last else length - count  # slots that hold something already
        if known and (block.base + first != expected or first + known > block.filled):
            return None
        expected += length
        pages.extend(block.pages[first // size : (first + length - 1) // size + 1])
    return pages
