"""Who holds what of the accelerator: the model's bounds, the pools, and giving things back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from inferlet.abi import ModelInfo

from .pools import PagePool, RowPool
from .tables import EmbBlock, Entry, Hidden, KvBlock, Queue

if TYPE_CHECKING:
    from .seat import Seat


class Machine:
    """`make_room(pages, seat)` frees pages by ending newer inferlets than `seat`; False if it
    ended `seat` itself."""

    def __init__(
        self,
        model: ModelInfo,
        pages: PagePool,
        rows: RowPool,
        scratch_slots: int,
        make_room: Callable[[int, Seat], bool],
    ) -> None:
        self.model = model
        self.pages = pages
        self.rows = rows
        self.scratch_slots = scratch_slots
        self.make_room = make_room

    def set_entries(self, emb: EmbBlock, first: int, entries: list[Entry]) -> None:
        """Fills embeds, giving back the rows of hidden states they held."""
        end = first + len(entries)
        for old in emb.entries[first:end]:
            if type(old) is Hidden:
                self.rows.release(old.row)
        emb.entries[first:end] = entries

    def free_pages(self, seat: Seat, block: KvBlock, first: int, end: int) -> None:
        """Lets go of pages first .. end - 1 of the block; those already freed are passed over."""
        for i in range(first, end):
            page = block.pages[i]
            if page >= 0:
                seat.pages_owned -= self.pages.release(page)
                block.pages[i] = -1
                seat.pages_held -= 1

    def free_kv(self, seat: Seat, block: KvBlock) -> None:
        self.free_pages(seat, block, 0, len(block.pages))
        block.alive = False

    def free_emb(self, seat: Seat, emb: EmbBlock) -> None:
        for entry in emb.entries:
            if type(entry) is Hidden:
                self.rows.release(entry.row)
        seat.embeds_held -= len(emb.entries)
        emb.entries.clear()

    def free_queue(self, seat: Seat, queue: Queue) -> None:
        """Everything made through the queue."""
        for kv in [h for h, b in seat.kvs.items() if b.queue is queue]:
            self.free_kv(seat, seat.kvs.pop(kv))
        for emb in [h for h, e in seat.embs.items() if e.queue is queue]:
            self.free_emb(seat, seat.embs.pop(emb))
        for token in [h for h, late in seat.tokens.items() if late.queue is queue]:
            del seat.tokens[token]

    def free_seat(self, seat: Seat) -> None:
        """Everything the inferlet held."""
        for block in seat.kvs.values():
            self.free_kv(seat, block)
        for emb in seat.embs.values():
            self.free_emb(seat, emb)
        seat.kvs.clear()
        seat.embs.clear()
        seat.tokens.clear()
        seat.queues.clear()
