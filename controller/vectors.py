"""Queued commands that move vectors between embeds and an inferlet's rings: read_emb, write_emb."""

from __future__ import annotations

from inferlet import abi
from inferlet.errors import ArgumentError, SpanError, UnwrittenError

from .forward import check_trait, embeds, positions_of, stopped, unwritten
from .items import VectorsIn, VectorsOut
from .run import Run
from .tables import Entry, Hidden, Late, undecided


def read_emb(run: Run, c: abi.ReadEmb) -> bool:
    check_trait(run.machine, "OutputEmbed")
    emb = embeds(run.seat, c.emb, "emb")
    _, first, count = c.emb
    _check_ring(run, count, c.offset, run.seat.limits.ring_bytes)
    entries = emb.entries[first : first + count]
    if any(unwritten(entry) for entry in entries):
        raise UnwrittenError("an embed holds nothing", "fill it first")
    if any(stopped(entry) for entry in entries):
        run.answer(c.req, None)
        return True
    lates: dict[Late, None] = {}
    sources = []  # row, or ~token id
    for entry in entries:
        if type(entry) is Hidden:
            sources.append(entry.row)
            lates.update(dict.fromkeys(undecided(entry.lates)))
        else:
            token = entry.value if type(entry) is Late else entry
            if token is None:
                return False
            sources.append(~token)  # type: ignore[operator]
    if not (run.has_share(count) and run.builder.has_vectors(count)):
        run.queue.pipelined = True
        return False
    index = run.builder.vectors_out(run.seat.number, c.offset, sources)
    size = 4 * run.machine.model.hidden_size
    run.flight.add(run.queue, VectorsOut(run.queue, index, tuple(lates), c.req, size))
    run.take_share(count)
    return True


def write_emb(run: Run, c: abi.WriteEmb) -> bool:
    check_trait(run.machine, "InputEmbed")
    emb = embeds(run.seat, c.target, "target")
    _, first, count = c.target
    _check_ring(run, count, c.offset, run.seat.limits.ring_in_bytes)
    positions = positions_of(c.positions, count, run.machine.model.max_context)
    if not (run.has_share(count) and run.builder.has_vectors(count)):
        run.queue.pipelined = True
        return False
    if not run.has_rows(count):
        return False
    rows = [run.machine.rows.take() for _ in range(count)]
    index = run.builder.vectors_in(run.seat.number, c.offset, rows)
    hidden: list[Entry] = [Hidden(row, 0, ()) for row in rows]
    run.machine.set_entries(emb, first, hidden, positions)
    run.flight.add(run.queue, VectorsIn(run.queue, run.machine, emb, first, hidden, index, c.req))
    run.risk()
    run.take_share(count)
    return True


def _check_ring(run: Run, count: int, offset: int, size: int) -> None:
    """SpanError, ArgumentError unless `count` vectors fit at `offset` of a ring of `size`."""
    if count == 0:
        raise SpanError("a span of no embeds", "name at least one")
    octets = 4 * run.machine.model.hidden_size * count
    if offset % 4 or offset + octets > size:
        raise ArgumentError(
            f"{octets} octets at offset {offset} of a ring of {size}",
            "use an offset that is a multiple of 4 and leaves room, or fewer embeds at a time",
        )
