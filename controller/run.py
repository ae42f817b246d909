"""One queue's share of a step: its longest run of commands that may go together.

The device carries out a step in stages: slot bookkeeping and copies, then forwards, then samples
and distributions. A command joins if its stage comes after the stage of every earlier command of
the run that it conflicts with; else it waits for the next step. Steps run in order, so nothing
older matters, but for one thing: what a token not yet known may undo (see `Run.settled`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inferlet import abi
from inferlet.errors import InferletError

from .flight import Answer, Flight
from .machine import Machine
from .packing import StepBuilder
from .tables import KvBlock, Late, Queue, any_dead, follows, undecided

Handler = Callable[["Run", Any], bool]  # False: the command must wait


class Run:
    """Takes from one queue into the open step. `budget`: prefill inputs the step has left."""

    def __init__(
        self, machine: Machine, builder: StepBuilder, flight: Flight, queue: Queue, budget: int
    ) -> None:
        self.machine = machine
        self.builder = builder
        self.flight = flight
        self.queue = queue
        self.seat = queue.seat
        self.budget = budget
        self.read: dict[KvBlock, int] = {}  # stage of the latest read in this run
        self.written: dict[KvBlock, int] = {}
        self.lingering = -1  # stage of the latest read of pages that another handle still holds
        self.prefilled = False  # it finished a prefill: others' turn

    def take(self, handlers: dict[type[abi.Command], Handler]) -> None:
        """Carries out commands from the queue's head until one has to wait or has no handler."""
        queue, seat, commands = self.queue, self.seat, self.queue.commands
        while commands:
            command = commands[0]
            handler = handlers.get(type(command))
            if handler is None:
                return
            if queue.error is not None and type(command) not in DESPITE_ERROR:
                queue.current = None
                self.answer(command.req, queue.error)
            else:
                try:
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

    def answer(self, request: int | None, value: object) -> None:
        """Answers (an InferletError as such) now, or after what is in flight of this queue."""
        answer_in_order(self.queue, request, value)

    def take_share(self, work: int) -> None:
        """Counts inputs, samples and distributions against the inferlet's share of the step."""
        shares = self.builder.shares
        shares[self.seat] = shares.get(self.seat, 0) + work

    # --- conflicts within the step --------------------------------------------

    def may_read(self, block: KvBlock, stage: int) -> bool:
        return self.written.get(block, -1) < stage

    def may_write(self, block: KvBlock, stage: int) -> bool:
        read = max(self.read.get(block, -1), self.lingering)
        return self.written.get(block, -1) < stage and read < stage

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
DESPITE_ERROR = frozenset({abi.Synchronize, abi.DeallocKvPage, abi.DeallocEmb, abi.DeallocToken})


def answer_in_order(queue: Queue, request: int | None, value: object) -> None:
    """Answers after what is in flight of the queue, so that answers keep queue order."""
    if request is None:
        return
    if queue.flight is not None:
        queue.flight.items.append(Answer(queue, request, value))
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
