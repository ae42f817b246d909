"""Queued commands that become part of a step: forward, copy, mask here; the table of all."""

from __future__ import annotations

from array import array
from typing import Final

from inferlet import abi
from inferlet.errors import SpanError

from .controls import CONTROLS
from .forward import Pass, check_again, inputs, kv_block, prepare, writable
from .items import Kept, Written
from .run import COST_OF_SLOT, Handler, Run
from .sampling import get_next_dist, sample
from .tables import Entry, Hidden, Late, any_dead, undecided
from .vectors import read_emb, write_emb

_COPIES: Final = 0  # stages of a step, those in which KV is touched
_FORWARDS: Final = 1
_SMALL: Final = 16  # inputs that count as decode: not held to the prefill budget
_MOST_LISTED: Final = 1 << 19  # slots that a step lists, 2 MiB of message; a first call's always
_FEW_SPANS: Final = 16  # of a forward's reads; with more of them, they are bookkeeping
_SPAN: Final = 8  # and each is as much of it as so many pages
_MOST_DOUBTFUL: Final = 4  # tokens that may yet be stopped, among one call's inputs


def forward(run: Run, c: abi.Forward) -> bool:
    queue, call = run.queue, run.queue.current
    if call is None or any_dead(call.lates):
        if len(c.reads) > _FEW_SPANS and not run.has_turn(_SPAN * len(c.reads)):
            queue.pipelined = True  # it waits for the next turn, not for an answer
            return False
        entries = inputs(run.seat, c)
        if not _decided(run, entries):
            return False
        call = prepare(run.machine, run.seat, c, entries)
        if call is None:
            queue.current = None
            run.answer(c.req, None)
            return True
    else:
        check_again(call, run.seat, c, run.machine.pages)
    count = _admit(run, call)
    if count == 0:  # one not begun is prepared afresh next time: what it reads may change till then
        return False
    _pack(run, call, count)
    if call.done < len(call.tokens):
        queue.current = call
        queue.pipelined = True
        return False
    queue.current = None
    run.answer(c.req, None)
    return True


def _decided(run: Run, entries: list[Entry]) -> bool:
    """False if this very step makes one of the inputs."""
    number = run.builder.number
    for entry in entries:
        if (type(entry) is Late or type(entry) is Hidden) and entry.step == number:
            run.queue.pipelined = True
            return False
    return True


def _admit(run: Run, call: Pass) -> int:
    """How many of the call's inputs go with this step; 0 if it has to wait."""
    doubtful = undecided(call.lates)
    if len(doubtful) > _MOST_DOUBTFUL:
        return 0  # who descends from whom would take too long to tell
    for block, _, _ in call.reads:
        if not (run.may_read(block, _FORWARDS) and run.settled(block, doubtful)):
            return 0
    if call.write:
        block, first = call.write
        if not (run.may_write(block, _FORWARDS) and run.settled(block, doubtful)):
            return 0
        if (doubtful or run.queue.risky) and first + call.done < block.filled:
            return 0  # it would overwrite, which cannot be undone
    elif run.builder.scratch_used + len(call.tokens) > run.machine.scratch_slots:
        return 0
    count = _has_room(run, call)
    if call.pages is None and not _has_slots(run, call, count):
        count = 0
    if count and run.seat.pace is not None:
        count = run.paced(count, call.splittable and count > _SMALL)
    if count == 0:
        run.queue.pipelined = True  # it waits for room in a step, not for an answer
    elif call.outputs and not run.has_rows(min(count, call.outputs[2])):
        return 0
    return count


def _has_room(run: Run, call: Pass) -> int:
    """How many of the call's inputs the step has room for. One call that cannot be split goes along
    whatever its size, or it might wait for ever for a step that has so much."""
    builder, left = run.builder, len(call.tokens) - call.done
    if left <= _SMALL:
        return left if left <= builder.room and run.has_share(left) else 0
    most = min(builder.prefill_room, builder.room)
    if call.splittable:
        return min(left, max(most, 0))
    return left if most >= 0 else 0


def _has_slots(run: Run, call: Pass, count: int) -> bool:
    """False if the step would list too many slots, this call's not being the first."""
    listed = run.builder.listed_slots
    return not listed or listed + call.read_slots + call.done + count <= _MOST_LISTED


def _pack(run: Run, call: Pass, count: int) -> None:
    builder, done = run.builder, call.done
    tokens = call.tokens[done : done + count]
    positions = call.positions[done : done + count]
    doubtful = undecided(call.lates)
    for block, _, _ in call.reads:
        run.read[block] = _FORWARDS
    if call.pages is not None:
        kv = call.read_slots + done + count
        size = run.machine.model.page_size
        pages = call.pages[: -(-kv // size)]
        builder.paged(tokens, positions, pages, kv)
    else:
        builder.listed(tokens, positions, _reads(call), _write_slots(run, call, count), call.mask)
    if call.write:
        block, at = call.write
        first = at + done
        run.written[block] = _FORWARDS
        fresh = first >= block.filled
        block.note_write(first, count, positions[0] if call.consecutive else None)
        if doubtful:
            block.conditional = doubtful
        run.flight.add(run.queue, Written(run.queue, block, first, count, doubtful, fresh))
    else:
        run.flight.touch(run.queue)
    _keep_outputs(run, call, count, doubtful)
    call.done += count
    run.take_share(count)
    run.cost += (call.read_slots + call.done) * COST_OF_SLOT
    if count > _SMALL:
        builder.prefill_room -= count
    seat = run.seat
    seat.stats.tokens_in += count
    if seat.pace is not None:
        seat.pace.take_tokens(count)


def _reads(call: Pass) -> array[int]:
    """Slots attended beside this piece's inputs: i32[*]."""
    slots = array("i")
    for block, first, length in call.reads:
        slots.extend(block.slots(first, length))
    if call.write and call.done:
        block, at = call.write
        slots.extend(block.slots(at, call.done))
    return slots


def _write_slots(run: Run, call: Pass, count: int) -> array[int]:
    if call.write:
        block, at = call.write
        return block.slots(at + call.done, count)
    start = run.machine.pages.total * run.machine.model.page_size + run.builder.scratch_used
    run.builder.scratch_used += count
    return array("i", range(start, start + count))


def _keep_outputs(run: Run, call: Pass, count: int, doubtful: tuple[Late, ...]) -> None:
    if not call.outputs:
        return
    emb, at, length = call.outputs
    skip = len(call.tokens) - length  # inputs before the first one kept
    start = max(call.done, skip)
    kept: list[Entry] = []
    for i in range(start, call.done + count):
        row = run.machine.rows.take()
        run.builder.keep(call.pages is None, call.done + count - 1 - i, row)
        kept.append(Hidden(row, run.builder.number, doubtful))
    if kept:
        positions = call.positions[start : call.done + count]
        run.machine.set_entries(emb, at + start - skip, kept, positions)
        run.flight.add(run.queue, Kept(run.queue, run.machine, emb, at + start - skip, kept))


def copy_kvpage(run: Run, c: abi.CopyKvPage) -> bool:
    source = kv_block(run.seat, c.source, "source")
    target = kv_block(run.seat, c.target, "target")
    first, at, length = c.source[1], c.target[1], c.source[2]
    if length != c.target[2]:
        raise SpanError(f"a copy of {length} slots to {c.target[2]}", "make the lengths equal")
    if source is target and first < at + length and at < first + length:
        raise SpanError("source and target overlap", "copy to other slots")
    if length:
        if not run.has_turn(length // run.machine.model.page_size):
            return False
        writable(target, at, length, run.machine.pages)
        if not (run.settled(source) and run.settled(target)):
            return False
        if not (run.may_read(source, _COPIES) and run.may_write(target, _COPIES)):
            return False
        run.read.setdefault(source, _COPIES)  # an earlier forward's read is a later stage
        run.written[target] = _COPIES
        run.cost += length * COST_OF_SLOT
        run.builder.copy(source.slots(first, length), target.slots(at, length))
        known = source.regular and first + length <= source.filled
        target.note_write(at, length, source.base + first if known else None)
        run.flight.touch(run.queue)
    run.answer(c.req, None)
    return True


def mask_kvpage(run: Run, c: abi.MaskKvPage) -> bool:
    block = kv_block(run.seat, c.span, "span")
    _, first, length = c.span
    if length:
        if not run.has_turn(length // run.machine.model.page_size):
            return False
        writable(block, first, length, run.machine.pages)
    if length and not (c.visible and block.regular):
        if not (run.settled(block) and run.may_write(block, _COPIES)):
            return False
        run.written[block] = _COPIES
        run.cost += length * COST_OF_SLOT
        block.regular = False
        run.builder.mask(block.slots(first, length), c.visible)
        run.flight.touch(run.queue)
    run.answer(c.req, None)
    return True


CALLS: dict[type[abi.Command], Handler] = {
    **CONTROLS,
    abi.Forward: forward,
    abi.Sample: sample,
    abi.GetNextDist: get_next_dist,
    abi.CopyKvPage: copy_kvpage,
    abi.MaskKvPage: mask_kvpage,
    abi.ReadEmb: read_emb,
    abi.WriteEmb: write_emb,
}
