"""Who holds what of the accelerator: the model's bounds, the pools, and giving things back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from inferlet.abi import ModelInfo

from .pools import PagePool, RowPool
from .tables import EmbBlock, Entry, Hidden, History, KvBlock, Queue, in_host_memory

if TYPE_CHECKING:
    from .accounts import Account
    from .exports import Exports
    from .seat import Seat
    from .swapping import Swapping


MOST_PAGES_A_TURN: Final = 16384  # a few milliseconds of a user's bookkeeping; a first call's


class Machine:
    def __init__(
        self,
        model: ModelInfo,
        pages: PagePool,
        rows: RowPool,
        scratch_slots: int,
        exports: Exports,
        swapping: Swapping,
    ) -> None:
        self.model = model
        self.pages = pages
        self.rows = rows
        self.scratch_slots = scratch_slots
        self.exports = exports
        self.swapping = swapping
        # pages whose holders changed, this turn of the loop, by user; and the inferlets it was for
        self.touched: dict[Account, int] = {}
        self.touching: set[Seat] = set()
        self.held_up: dict[Queue, None] = {}  # those that go on in the next turn

    def settle(self) -> None:
        """The open step is sent: what was freed while it was packed can be taken."""
        self.pages.settle()
        self.swapping.places.settle()
        self.rows.settle()

    def set_entries(
        self, emb: EmbBlock, first: int, entries: list[Entry], positions: list[int]
    ) -> None:
        """Fills embeds, giving back the rows of vectors they held."""
        end = first + len(entries)
        for old in emb.entries[first:end]:
            if type(old) is Hidden:
                self.rows.release(old.row)
        emb.entries[first:end] = entries
        emb.positions[first:end] = positions

    def unwrite(self, emb: EmbBlock, first: int, entries: list[Entry]) -> None:
        """Empties the embeds from `first` on that hold `entries`; others were freed or filled."""
        for i, entry in enumerate(entries, first):
            if i < len(emb.entries) and emb.entries[i] is entry:
                self.set_entries(emb, i, [None], [0])

    def free_pages(self, seat: Seat, block: KvBlock, first: int, end: int) -> None:
        """Lets go of pages first .. end - 1 of the block; those already freed are passed over."""
        for i in range(first, end):
            page = block.pages[i]
            if page == -1:
                continue
            if page >= 0:
                self.pages.release(page)
            else:
                self.swapping.places.release(in_host_memory(page))
                seat.swapped -= 1
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

    @staticmethod
    def free_history(seat: Seat, history: History) -> None:
        seat.history_held -= len(history)

    def free_queue(self, seat: Seat, queue: Queue) -> None:
        """Everything made through the queue."""
        for kv in [h for h, b in seat.kvs.items() if b.queue is queue]:
            self.free_kv(seat, seat.kvs.pop(kv))
        for emb in [h for h, e in seat.embs.items() if e.queue is queue]:
            self.free_emb(seat, seat.embs.pop(emb))
        for token in [h for h, late in seat.tokens.items() if late.queue is queue]:
            del seat.tokens[token]
        for history in [h for h, made in seat.histories.items() if made.queue is queue]:
            self.free_history(seat, seat.histories.pop(history))

    def free_seat(self, seat: Seat) -> None:
        """Everything the inferlet held, and its exports without a lease."""
        self.exports.exporter_ended(seat)
        self.swapping.forget(seat)
        for block in seat.kvs.values():
            self.free_kv(seat, block)
        for emb in seat.embs.values():
            self.free_emb(seat, emb)
        seat.kvs.clear()
        seat.embs.clear()
        seat.tokens.clear()
        seat.histories.clear()
        seat.history_held = 0
        seat.queues.clear()
