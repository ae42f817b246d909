"""One queue's share of a step: its longest run of commands that may go together.

The device carries out a step in stages: slot bookkeeping and copies, then vectors in, forwards,
samples and distributions, and vectors out. A command joins if its stage comes after the stage of
every earlier command of the run that it conflicts with; else it waits for the next step. Steps run
in order, so nothing older matters, but for one thing: what a token not yet known may undo (see
`Run.settled`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from inferlet import abi
from inferlet.errors import InferletError, OutOfMemoryError

from .flight import Flight
from .items import Answer
from .machine import MOST_PAGES_A_TURN, Machine
from .packing import StepBuilder
from .tables import KvBlock, Late, Queue, any_dead, follows, undecided

Handler = Callable[["Run", Any], bool]  # False: the command must wait

# What one inferlet may put into a step, so that nobody makes it long for all: inputs, samples,
# distributions and vectors in and out; small calls only. A first one is always taken.
_MOST_SHARE: Final = 1024
# Of a slot that is attended to or copied, against 1 for an input of a forward and for a sample. It
# is about 1/25 on the CPU and, by arithmetic, 1/700 on a large accelerator.
COST_OF_SLOT: Final = 1 / 256


class Run:
    """Takes from one queue into the open step."""

    def __init__(
        self, machine: Machine, builder: StepBuilder, flight: Flight, queue: Queue
    ) -> None:
        self.machine = machine
        self.builder = builder
        self.flight = flight
        self.queue = queue
        self.seat = queue.seat
        self.read: dict[KvBlock, int] = {}  # stage of the latest read in this run
        self.written: dict[KvBlock, int] = {}
        self.cost = 0.0  # to its user: inputs, samples, and what else the accelerator does for it
        self.resumes = 0.0  # when the inferlet's rate lets it go on, if that is what it waits for
        self.command: abi.Command | None = None  # the head

    def take(self, handlers: dict[type[abi.Command], Handler]) -> None:
        """Carries out commands from the queue's head until one has to wait or has no handler."""
        queue, seat, commands = self.queue, self.seat, self.queue.commands
        while commands:
            command = self.command = commands[0]
            handler = handlers.get(type(command))
            if handler is None:
                return
            if queue.error is not None and type(command) not in DESPITE_ERROR:
                queue.current = None
                self.answer(command.req, queue.error)
            elif queue.risky is not None and type(command) in _LASTING:
                return
            else:
                try:
                    if seat.absent and not self.machine.swapping.admit(self):
                        return
                    if not handler(self, command):
                        return
                except InferletError as error:
                    queue.current = None
                    queue.error = queue.error or error
                    self.answer(command.req, error)
            if seat.closed:
                return
            commands.popleft()
            seat.queued -= 1
            if seat.weights.octets:
                seat.weights.remove((command,))

    def answer(self, request: int | None, value: object) -> None:
        """Answers (an InferletError as such) now, or after what is in flight of this queue."""
        if request is not None:
            answer_in_order(self.queue, request, value, type(self.command) in DESPITE_ERROR)

    def risk(self) -> None:
        """The part just added may turn out wrong by itself, and its queue stop with it."""
        self.queue.risky = self.flight

    # --- room in the step -----------------------------------------------------

    def has_share(self, work: int) -> bool:
        """False if the inferlet has had its share of the step."""
        share = self.builder.shares.get(self.seat, 0)
        return not share or share + work <= _MOST_SHARE

    def take_share(self, work: int) -> None:
        shares = self.builder.shares
        shares[self.seat] = shares.get(self.seat, 0) + work
        self.cost += work

    def paced(self, count: int, splittable: bool) -> int:
        """How many of a forward's `count` inputs the inferlet's rate lets go now: all, a second's
        worth, or none, and then not before `resumes`."""
        pace = self.seat.pace
        if pace is None or pace.tokens is None:
            return count
        if splittable:
            count = min(count, pace.tokens.most)
        self.resumes = pace.tokens_due(count, time.monotonic())
        return 0 if self.resumes else count

    def has_rows(self, wanted: int) -> bool:
        """False if rows freed in this very step will do for the next one. OutOfMemoryError."""
        rows = self.machine.rows
        if rows.available < wanted and not self.builder.has_work:
            rows.settle()
        if rows.available >= wanted:
            return True
        if rows.free >= wanted:
            return False
        raise OutOfMemoryError(
            f"{wanted} rows for hidden states and vectors; {rows.free} are free",
            "free embeds when done with them, or ask for fewer outputs",
        )

    def has_turn(self, pages: int) -> bool:
        """False if the inferlet is to go on in the loop's next turn, its user having taken, freed,
        shared or looked through enough pages in this one; else so many more are counted."""
        machine, seat, account = self.machine, self.seat, self.seat.account
        touched = machine.touched.get(account, 0)
        if touched and touched + pages > MOST_PAGES_A_TURN:
            machine.held_up[self.queue] = None
            return False
        machine.touched[account] = touched + pages
        machine.touching.add(seat)
        return True

    # --- conflicts within the step --------------------------------------------

    def may_read(self, block: KvBlock, stage: int) -> bool:
        return self.written.get(block, -1) < stage

    def may_write(self, block: KvBlock, stage: int) -> bool:
        if max(self.read.get(block, -1), self.written.get(block, -1)) >= stage:
            return False
        lingering = self.builder.lingering
        return not lingering or all(lingering.get(page, -1) < stage for page in block.pages)

    def linger(self, block: KvBlock, first: int, end: int) -> None:
        """The block, read in this run, lets go of pages first .. end - 1. Who holds them still,
        another inferlet perhaps, may write into them after that read."""
        for page in block.pages[first:end]:
            if page >= 0 and self.machine.pages.shared(page):
                lingering = self.builder.lingering
                lingering[page] = max(lingering.get(page, -1), self.read[block])

    # --- conflicts with what may be undone ------------------------------------

    def settled(self, block: KvBlock, lates: tuple[Late, ...] = ()) -> bool:
        """True if a call made from `lates` may look at the block now.

        The latest write in flight may be undone when a token it was made from turns out dead. Then
        a call must not have seen it, unless that token's death drops the call as well.
        """
        if block.conditional:
            if any_dead(block.conditional):
                return False  # it will be undone when it lands
            block.conditional = undecided(block.conditional)
            return not block.conditional or follows(lates, block.conditional)
        return True


# A stopped queue still gives back what it is asked to give back.
DESPITE_ERROR = frozenset(
    {
        abi.Synchronize,
        abi.DeallocKvPage,
        abi.DeallocEmb,
        abi.DeallocToken,
        abi.DeallocHistory,
    }
)
# What these do outlasts their failing with a part before them that turns out wrong, so they wait.
_LASTING = frozenset(
    {
        abi.AllocKvPage,
        abi.ShareKvPage,
        abi.CopyKvPage,
        abi.MaskKvPage,
        abi.AllocEmb,
        abi.AllocHistory,
        abi.ExtendHistory,
        abi.ExportKvPage,
        abi.ImportKvPage,
    }
)


def answer_in_order(
    queue: Queue, request: int | None, value: object, carried_out: bool = False
) -> None:
    """Answers after what is in flight of the queue, so that answers keep queue order.

    `carried_out`: the answer stands even if what is in flight fails."""
    if request is None:
        return
    if queue.flight is not None:
        queue.flight.items.append(Answer(queue, request, value, carried_out))
    elif isinstance(value, InferletError):
        queue.seat.fail(request, value)
    else:
        queue.seat.answer(request, value)


def synchronize(run: Run, command: abi.Synchronize) -> bool:
    queue = run.queue
    if queue.flight is not None:
        return False  # it may still fail, which is this answer's to report
    error, queue.error = queue.error, None
    run.answer(command.req, error)
    return True
