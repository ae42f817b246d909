"""The batcher: which commands make the next step.

Vertical and horizontal batching (Pie, section 5.2) in one: every ready queue gives its longest
run, and all of it is one step. Work-conserving: a step leaves whenever the backend has nothing to
do, and one more behind it only for queues that can go on without having seen the results
(late-bound tokens, further chunks of a prefill), so that those who think between tokens gather in
the next full batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final

from inferlet.abi import Command, ExportKvPage, Synchronize
from inferlet.errors import BackendError, CancelledError

from piehost.wire.control import ControllerStats
from piehost.wire.step import MAX_IN_FLIGHT, Step, StepDone

from .calls import CALLS
from .controls import CONTROLS
from .flight import Flight, Outcome, fail, finish
from .machine import Machine
from .packing import StepBuilder
from .run import Run, answer_in_order
from .tables import Queue


class Batcher:
    """Holds the ready queues, the open step, and the steps in flight."""

    def __init__(self, machine: Machine, policy: str, chunk_tokens: int) -> None:
        self.machine = machine
        self.stats = ControllerStats()
        self._eager = policy == "eager"
        self._chunk_tokens = chunk_tokens
        self._ready: dict[Queue, None] = {}  # in order of arrival
        self._flights: deque[Flight] = deque()
        self._arrivals = 0
        self._builder = StepBuilder(1, machine.model.page_size)
        self._flight = Flight(1)
        self.lost = False  # the backend is gone: every device command fails

    # --- in -------------------------------------------------------------------

    def arrived(self, queue: Queue) -> None:
        """Commands were put on the queue: does at once what needs no device."""
        if queue not in self._ready:
            self._arrivals += 1
            queue.since = self._arrivals
            self._ready[queue] = None
        Run(self.machine, self._builder, self._flight, queue, 0).take(CONTROLS)
        if not queue.commands:
            self._ready.pop(queue, None)

    def begin_turn(self) -> None:
        """Another turn of the loop: goes on with what was held up in the last one."""
        machine = self.machine
        machine.touched.clear()
        held_up, machine.held_up = machine.held_up, {}
        for queue in held_up:
            if queue.commands:
                self.arrived(queue)

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
        self._ready.pop(queue, None)
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
            self._ready.pop(queue, None)
            queue.seat.queued -= len(queue.commands)
            queue.seat.weights.remove(queue.commands)
            queue.commands.clear()
            queue.current = None

    # --- out ------------------------------------------------------------------

    def next_step(self) -> Step | None:
        """The next step to send, if one should leave now."""
        if not self._ready or not self._may_dispatch():
            return None
        builder, flight = self._builder, self._flight
        budget = self._chunk_tokens
        if self.lost:
            self._fail_ready()
            return None
        for queue in sorted(self._ready, key=_urgency):
            queue.pipelined = False
            run = Run(self.machine, builder, flight, queue, budget)
            run.take(CALLS)
            budget = run.budget
            if run.prefilled:
                self._arrivals += 1
                queue.since = self._arrivals  # to the back: nobody's prompts hold up all others
            if not queue.commands:
                self._ready.pop(queue, None)
            if self._eager and builder.has_work:
                break
        return self._seal() if builder.has_work else None

    def _may_dispatch(self) -> bool:
        if not self._flights:
            return True
        if len(self._flights) >= MAX_IN_FLIGHT:
            return False
        return self._eager or any(queue.pipelined for queue in self._ready)

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
        self.machine.pages.settle()
        self.machine.rows.settle()
        self._builder = StepBuilder(builder.number + 1, self.machine.model.page_size)
        self._flight = Flight(builder.number + 1)
        return builder.message()

    def done(self, answer: StepDone, now: float) -> None:
        """The backend answered the oldest step in flight. `now`: seconds, monotonic."""
        flight = self._flights.popleft()
        assert flight.step == answer.step, "the backend answers in order"
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
        """Carries out the commands that waited for the flight alone."""
        for queue in flight.queues:
            if queue.commands and queue.flight is None and type(queue.commands[0]) in _SETTLED:
                self.arrived(queue)

    def lose_backend(self) -> None:
        """Fails what is in flight and, from now on, every call."""
        self.lost = True
        while self._flights:
            fail(self._flights.popleft(), _lost(), self._flights)
        self._fail_ready()

    def _fail_ready(self) -> None:
        for queue in list(self._ready):
            Run(self.machine, self._builder, self._flight, queue, 0).take(_LOST)
            if not queue.commands:
                self._ready.pop(queue, None)


def _lost() -> BackendError:
    return BackendError("the backend process is gone", "launch again; the host restarts it")


def _refuse(run: Run, command: Command) -> bool:
    raise _lost()


def _urgency(queue: Queue) -> tuple[int, int]:
    return (-queue.priority, queue.since)


_MOST_REASON: Final = 1000  # characters of a backend's error that are passed on
_LOST: Final = {**dict.fromkeys(CALLS, _refuse), **CONTROLS}  # without a backend
_SETTLED: Final = (ExportKvPage, Synchronize)  # these wait until nothing is in flight
_FREEING: Final = frozenset(c for c in CONTROLS if c.__name__.startswith("Dealloc"))
