"""The batcher: which commands make the next step.

Vertical and horizontal batching (Pie, section 5.2) in one: every ready queue gives its longest
run, and all of it is one step. Work-conserving: a step leaves whenever the backend has nothing to
do, and one more behind it only for queues that can go on without having seen the results
(late-bound tokens, further chunks of a prefill), so that those who think between tokens gather in
the next full batch. When a step has not room for all, whose user has had least goes first
(`accounts.py`), and an inferlet's own rate may hold it up (`rates.py`).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable
from heapq import heapify, heappop, heapreplace
from typing import TYPE_CHECKING, Final

from inferlet.abi import Command, ExportKvPage, Synchronize
from inferlet.errors import BackendError, CancelledError

from piehost.wire.control import ControllerStats, Rates
from piehost.wire.step import MAX_IN_FLIGHT, Step, StepDone

from .accounts import Account, Accounts
from .calls import CALLS
from .controls import CONTROLS
from .flight import Flight, Outcome, fail, finish
from .machine import Machine
from .packing import StepBuilder
from .run import Run, answer_in_order
from .tables import Queue

if TYPE_CHECKING:
    from .seat import Seat


class Batcher:
    """Holds the ready queues, the open step, and the steps in flight. `step_tokens`: inputs of a
    step, of which `chunk_tokens` of prompts."""

    def __init__(
        self,
        machine: Machine,
        accounts: Accounts,
        policy: str,
        step_tokens: int,
        chunk_tokens: int,
    ) -> None:
        self.machine = machine
        self.stats = ControllerStats()
        self._eager = policy == "eager"
        self._rooms = (step_tokens, chunk_tokens)
        self._accounts = accounts
        self._active: dict[Account, None] = {}  # users with ready queues
        self.slowed: dict[Queue, float] = {}  # those not ready for their rate, and until when
        self._left_out = False  # the last step had not room for all
        self._flights: deque[Flight] = deque()
        self._arrivals = 0
        self._builder = StepBuilder(1, machine.model.page_size, *self._rooms)
        self._flight = Flight(1)
        self.lost = False  # the backend is gone: every device command fails
        # The latest answer counts until then; if all since `_crowded_until` were of one inferlet,
        # its number, else 0
        self._busy_until = self._crowded_until = -math.inf
        self._alone = 0

    # --- in -------------------------------------------------------------------

    def arrived(self, queue: Queue) -> None:
        """Commands were put on the queue: does at once what needs no device."""
        if queue not in queue.seat.account.ready:
            if queue in self.slowed:
                return
            self._arrivals += 1
            queue.since = self._arrivals
            self._enter(queue)
        Run(self.machine, self._builder, self._flight, queue).take(CONTROLS)
        if not queue.commands:
            self._leave(queue)

    def _enter(self, queue: Queue) -> None:
        account = queue.seat.account
        self._accounts.wake(queue.seat)
        account.ready[queue] = None
        self._active[account] = None

    def _leave(self, queue: Queue) -> None:
        account = queue.seat.account
        if queue in account.ready:
            del account.ready[queue]
            if not account.ready:
                del self._active[account]

    def begin_turn(self) -> None:
        """Another turn of the loop: goes on with what was held up in the last one, those first who
        had nothing of it, and with those whose rate lets them."""
        machine = self.machine
        machine.swapping.refresh()
        machine.touched.clear()
        if machine.touching:
            touching, machine.touching = machine.touching, set()
            held_up, machine.held_up = machine.held_up, {}
            for queue in sorted(held_up, key=lambda queue: queue.seat in touching):
                if queue.commands:
                    self.arrived(queue)
        if self.slowed:
            now = time.monotonic()
            self._resume([queue for queue, until in self.slowed.items() if until <= now])

    def _resume(self, queues: Iterable[Queue]) -> None:
        """Their rate holds them up no more."""
        for queue in queues:
            del self.slowed[queue]
            queue.pipelined = True  # it was not for an answer that it waited
            self._enter(queue)

    def set_rates(self, seat: Seat, rates: Rates) -> None:
        """The buckets are full again if they have changed."""
        if rates == seat.rates:
            return
        seat.set_rates(rates)
        self._resume([queue for queue in seat.queues.values() if queue in self.slowed])

    @property
    def has_turn_waiting(self) -> bool:
        """Something is to be done in the next turn, whatever comes."""
        return bool(self.machine.held_up)

    def cancel(self, queue: Queue, why: str) -> None:
        """Drops what has not been handed to the backend; freeing is still done."""
        error = CancelledError(why, "synchronize and go on")
        commands, queue.commands = queue.commands, deque()
        queue.current = None
        queue.seat.queued -= len(commands)
        queue.seat.weights.remove(commands)
        self._leave(queue)
        self.slowed.pop(queue, None)
        for command in commands:
            if type(command) in _FREEING:
                queue.commands.append(command)
                queue.seat.queued += 1
                self.arrived(queue)
            else:
                answer_in_order(queue, command.req, error)

    def forget(self, queues: Iterable[Queue]) -> None:
        """The queues' inferlet is gone."""
        for queue in queues:
            self._leave(queue)
            self.slowed.pop(queue, None)
            queue.seat.queued -= len(queue.commands)
            queue.seat.weights.remove(queue.commands)
            queue.commands.clear()
            queue.current = None

    # --- out ------------------------------------------------------------------

    def next_step(self) -> Step | None:
        """The next step to send, if one should leave now."""
        if not self._active or not self._may_dispatch():
            return None
        self.machine.swapping.refresh()
        if self.lost:
            self._fail_ready()
            return None
        self._fill()
        return self._seal() if self._builder.has_work else None

    def _may_dispatch(self) -> bool:
        if not self._flights:
            return True
        if len(self._flights) >= MAX_IN_FLIGHT:
            return False
        if self._eager or self._left_out:
            return True
        return any(queue.pipelined for account in self._active for queue in account.ready)

    def _fill(self) -> None:
        """Takes from the ready queues until the step is full."""
        if len(self._active) > 1:
            self._share_out()
            return
        self._left_out = True
        (user,) = self._active
        for queue in _in_order(user) if len(user.ready) > 1 else [*user.ready]:
            self._take(queue)
            if self._builder.room <= 0 or (self._eager and self._builder.has_work):
                return
        self._left_out = False

    def _share_out(self) -> None:
        """Always takes from the user who has had least, going on to the next of its queues."""
        builder = self._builder
        turns = [(user.served, user.number, user, iter(_in_order(user))) for user in self._active]
        heapify(turns)
        gave: set[Account] = set()
        while turns and builder.room > 0:
            _, number, user, queues = turns[0]
            for queue in queues:
                if self._take(queue):
                    gave.add(user)
                    heapreplace(turns, (user.served, number, user, queues))
                    break
            else:
                heappop(turns)
                if user not in gave and not any(queue.pipelined for queue in user.ready):
                    self._accounts.lift(user)  # it waits, but not for the others
            if self._eager and builder.has_work:
                break
        self._left_out = bool(turns)

    def _take(self, queue: Queue) -> bool:
        """True if it gave something to the step."""
        queue.pipelined = False
        run = Run(self.machine, self._builder, self._flight, queue)
        run.take(CALLS)
        if not queue.commands:
            self._leave(queue)
        elif run.resumes:
            self._leave(queue)
            self.slowed[queue] = run.resumes
        if not run.cost:
            return False
        self._accounts.serve(queue.seat, run.cost)
        if queue.current is None:  # else it is a prompt under way, which goes on first
            self._arrivals += 1
            queue.since = self._arrivals
        return True

    def _seal(self) -> Step:
        builder, flight, stats = self._builder, self._flight, self.stats
        self._flights.append(flight)
        for seat in {queue.seat for queue in flight.queues}:
            seat.stats.steps += 1
            seat.stats.batch_sum += builder.segments
        stats.steps += 1
        stats.tokens_in += builder.inputs
        stats.decode_steps += builder.decodes > 0
        stats.decode_segments += builder.decodes
        self.machine.settle()
        self._builder = StepBuilder(builder.number + 1, self.machine.model.page_size, *self._rooms)
        self._flight = Flight(builder.number + 1)
        return builder.message()

    def others_until(self, seat: Seat, now: float) -> float:
        """When the accelerator will be free of other inferlets: not foreseen (infinity) while it
        works for one; after that it is theirs for as long as the step took, since they may be
        thinking of the next. In the past if it is free. Seconds, monotonic."""
        if any(len(flight.seats) > 1 or seat not in flight.seats for flight in self._flights):
            return math.inf
        return self._crowded_until if seat.number == self._alone else self._busy_until

    def done(self, answer: StepDone, now: float) -> None:
        """The backend answered the oldest step in flight. `now`: seconds, monotonic."""
        flight = self._flights.popleft()
        assert flight.step == answer.step, "the backend answers in order"
        alone = next(iter(flight.seats)).number if len(flight.seats) == 1 else 0
        if not alone or alone != self._alone:
            self._crowded_until, self._alone = self._busy_until, alone
        self._busy_until = now + min(answer.seconds, _MOST_THOUGHT)
        self.stats.backend_seconds += answer.seconds
        if answer.error is not None:
            why = answer.error[:_MOST_REASON]
            error = BackendError(why, "try again; see `piehost ps` and the log")
            fail(flight, error, self._flights)
            self._report(flight)
            return
        outcome = Outcome(answer, now)
        self.stats.tokens_out += len(outcome.tokens)
        finish(flight, outcome, self._flights)
        self._builder.clear_slots(outcome.clear_slots)
        self._report(flight)

    def _report(self, flight: Flight) -> None:
        """Carries out the commands that waited for the flight alone. What failed with it is told
        so whatever its rate."""
        for queue in flight.queues:
            if queue.error is not None and queue in self.slowed:
                self._resume([queue])
            if queue.commands and queue.flight is None and type(queue.commands[0]) in _SETTLED:
                self.arrived(queue)

    def lose_backend(self) -> None:
        """Fails what is in flight and, from now on, every call."""
        self.lost = True
        while self._flights:
            fail(self._flights.popleft(), _lost(), self._flights)
        self._fail_ready()

    def _fail_ready(self) -> None:
        self._resume([*self.slowed])
        for queue in [queue for account in self._active for queue in account.ready]:
            Run(self.machine, self._builder, self._flight, queue).take(_LOST)
            if not queue.commands:
                self._leave(queue)


def _lost() -> BackendError:
    return BackendError("the backend process is gone", "launch again; the host restarts it")


def _refuse(run: Run, command: Command) -> bool:
    raise _lost()


def _in_order(user: Account) -> list[Queue]:
    """The user's ready queues, the most urgent first."""
    return sorted(user.ready, key=_urgency)


def _urgency(queue: Queue) -> tuple[int, int, bool, float, int]:
    """What the operator says, then the inferlet; then a prompt under way, then whose inferlet has
    had least, then the longest waiting."""
    seat = queue.seat
    return (-seat.priority, -queue.priority, queue.current is None, seat.served, queue.since)


_MOST_THOUGHT: Final = 0.05  # seconds between two tokens
_MOST_REASON: Final = 1000  # characters of a backend's error that are passed on
_LOST: Final = {**dict.fromkeys(CALLS, _refuse), **CONTROLS}  # without a backend
_SETTLED: Final = (ExportKvPage, Synchronize)  # these wait until nothing is in flight
_FREEING: Final = frozenset(c for c in CONTROLS if c.__name__.startswith("Dealloc"))
