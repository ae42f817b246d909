"""Who gives way when KV pages run out: whose pages go to host memory, who waits, who is ended.

In this order: pages of idle inferlets, exports of inferlets that have ended, pages of inferlets
newer than the asker; then, if no waiting can help, the newest inferlet is ended (Pie, section 5.2).
Pages that somebody else holds too (an export, another inferlet) stay where they are. An inferlet
with pages in host memory gets all of them back before its next command that touches any.
"""

from __future__ import annotations

import math
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import TYPE_CHECKING, Final, NamedTuple

from inferlet import abi
from inferlet.errors import InferletError, OutOfMemoryError

from .exports import Exports
from .pools import PagePool
from .run import COST_OF_SLOT
from .tables import Queue, in_host_memory

if TYPE_CHECKING:
    from .packing import StepBuilder
    from .run import Run
    from .seat import Seat

# Whoever came back keeps its pages for so many steps or so long, whichever is over first.
_LEAST_STEPS: Final = 16
_LEAST_SECONDS: Final = 0.05
_PROMISED_SECONDS: Final = 4 * _LEAST_SECONDS  # a promise that is not asked for again is void
_PORTION: Final = 32  # pages that leave an inferlet together, if it has so many
_TOUCHING: Final = frozenset(
    {abi.Forward, abi.CopyKvPage, abi.MaskKvPage, abi.ShareKvPage, abi.ExportKvPage}
)
_ON_DEVICE: Final = _TOUCHING | {abi.Sample, abi.GetNextDist, abi.ReadEmb, abi.WriteEmb}


class Claim(NamedTuple):
    """The command at the head of a queue waits for pages."""

    queue: Queue
    command: abi.Command | None
    until: float  # seconds, monotonic

    def stands(self) -> bool:
        commands = self.queue.commands
        return bool(commands) and commands[0] is self.command and time.monotonic() < self.until


class Swapping:
    """`places`: pages of host memory; none: nothing is swapped. `seats` are all inferlets by
    number, `end` ends one for cause."""

    def __init__(
        self,
        pages: PagePool,
        places: PagePool,
        exports: Exports,
        seats: dict[int, Seat],
        end: Callable[[Seat, InferletError], None],
    ) -> None:
        self._pages = pages
        self.places = places
        self._exports = exports
        self._seats = seats
        self._end = end
        self.out = 0  # pages moved to host memory, ever
        self.back = 0
        self.retry_at = math.inf  # somebody waits: look again then; seconds, monotonic
        self._promise: Claim | None = None  # newer ones take no page before it
        self._waiting: dict[Queue, Claim] = {}
        self._giving_way: dict[Seat, Claim] = {}  # kept from the device, so that they can go
        self._came_back: dict[Seat, tuple[float, int]] = {}  # when: seconds, steps of its own
        self._survey = _Survey()

    # --- taking pages ---------------------------------------------------------

    def has_pages(self, run: Run, count: int) -> bool:
        """True if `count` pages can be taken now. Else the command is to wait, or its inferlet has
        been ended."""
        pool = self._pages
        promise = self._standing_promise()
        if promise and promise.queue.seat.number < run.seat.number:
            return self._wait(run)
        if pool.free < count and not self._make_room(count, run):
            return False if run.seat.closed else self._wait(run)
        if pool.available < count and not run.builder.has_work:
            pool.settle()  # no call of the open step can still look at them
        if pool.available < count:  # they come free with this very step
            self._promise = self._claim(run)
            run.queue.pipelined = run.queue.pipelined or run.builder.swaps
            return self._wait(run)
        if promise and promise.queue is run.queue:
            self._promise = None
        self._waiting.pop(run.queue, None)
        self._survey.grew(run.seat, count)
        return True

    def admit(self, run: Run) -> bool:
        """False if the next command of an absent inferlet is to wait. OutOfMemoryError."""
        seat, kind = run.seat, type(run.command)
        if kind not in _ON_DEVICE:
            return True
        claim = self._giving_way.get(seat)
        if claim is not None:
            promise = self._standing_promise()
            if promise and promise.queue is claim.queue:
                return self._wait(run)
            del self._giving_way[seat]
        if seat.swapped and kind in _TOUCHING:
            return self._bring_back(run)
        seat.absent = bool(seat.swapped)
        return True

    def refresh(self) -> None:
        """Steps may have been answered and commands have arrived: who is idle is to be seen
        again."""
        if self._survey.made:
            self._survey = _Survey()
        self.retry_at = math.inf

    def waits(self, seat: Seat) -> bool:
        """Whether one of its queues waits for pages."""
        claims = (self._waiting.get(queue) for queue in seat.queues.values())
        return any(claim is not None and claim.stands() for claim in claims)

    def forget(self, seat: Seat) -> None:
        """The inferlet has ended, and its queues with it."""
        self._giving_way.pop(seat, None)
        self._came_back.pop(seat, None)

    # --- who gives way --------------------------------------------------------

    def _make_room(self, count: int, run: Run) -> bool:
        """True once `count` pages are free, or will be with this step."""
        pool, asker = self._pages, run.seat
        if not run.builder.has_work:
            self.places.settle()  # no page of the open step comes from there
        while pool.free < count:
            if self.places.available and (victim := self._next_idle(asker)):
                self._swap_out(victim, count - pool.free, run.builder)
            elif self._exports.drop_orphan():
                continue
            elif self._may_wait(count, asker):
                self._press(count, run)
                return pool.free >= count
            elif not self._end_newest(asker):
                return False
        return True

    def _next_idle(self, asker: Seat) -> Seat | None:
        idle = self._look().idle
        while idle:
            seat = idle[-1]
            if seat is not asker and not seat.closed and _is_idle(seat) and self._movable(seat):
                return seat
            idle.pop()
        return None

    def _may_wait(self, count: int, asker: Seat) -> bool:
        """Whether the pages that others could swap out, at some time, are enough."""
        survey = self._look()
        theirs = survey.movable - survey.seats.get(asker, 0)
        return self._pages.free + min(theirs, self.places.free) >= count

    def _press(self, count: int, run: Run) -> None:
        """Newer inferlets swap out, the newest first; those with something in flight get nothing
        more to the device until they have. If all that is not enough, only waiting is left."""
        survey, asker = self._look(), run.seat
        newer = [*takewhile(lambda seat: seat.number > asker.number, survey.busy)]
        protected = sum(survey.seats[seat] for seat in survey.protected if seat is not asker)
        room = sum(survey.seats[seat] for seat in newer) + protected
        if self._pages.free + room < count:
            if self._promise and self._promise.queue is run.queue:
                self._promise = None
            return
        self._promise = claim = self._claim(run)
        coming = 0
        for seat in newer:
            lacking = count - self._pages.free - coming
            if lacking <= 0:
                return
            if seat.closed:
                continue
            if seat.last_step > seat.landed:
                self._giving_way[seat] = claim
                seat.absent = True
                coming += survey.seats[seat]
            else:
                self._swap_out(seat, lacking, run.builder)

    def _end_newest(self, asker: Seat) -> bool:
        """Ends the newest inferlet that holds or exports pages. False if that is the asker."""
        exporters = self._exports.exporters()
        newest = max(
            (s for s in self._seats.values() if s.pages_held or s.number in exporters),
            key=lambda seat: seat.number,
            default=asker,
        )
        victim = asker if newest.number < asker.number else newest
        where = "no KV page is free, in host memory neither" if self.places.total else ""
        self._end(
            victim,
            OutOfMemoryError(
                f"{where or 'no KV page is free'}; an older inferlet goes first and this one held "
                f"{victim.pages_held}",
                "launch again later, or serve with more --kv-pages"
                + (" or --swap-pages" if where else ""),
            ),
        )
        self._survey = _Survey()
        return victim is not asker

    def _wait(self, run: Run) -> bool:
        self._waiting[run.queue] = Claim(run.queue, run.command, math.inf)
        self.retry_at = min(self.retry_at, time.monotonic() + _LEAST_SECONDS)
        return False

    @staticmethod
    def _claim(run: Run) -> Claim:
        return Claim(run.queue, run.command, time.monotonic() + _PROMISED_SECONDS)

    def _standing_promise(self) -> Claim | None:
        if self._promise is not None and not self._promise.stands():
            self._promise = None
        return self._promise

    # --- who holds what -------------------------------------------------------

    def _look(self) -> _Survey:
        """Who has pages that can move; made once for all that ask in a turn."""
        if self._survey.made:
            return self._survey
        survey = self._survey = _Survey()
        survey.made = True
        self._waiting = {q: claim for q, claim in self._waiting.items() if claim.stands()}
        now = time.monotonic()
        for seat in self._seats.values():
            if seat.closed or not (pages := self._movable(seat)):
                continue
            survey.seats[seat] = pages
            survey.movable += pages
            if self._is_protected(seat, now):
                survey.protected.append(seat)
            else:
                (survey.idle if _is_idle(seat) else survey.busy).append(seat)
        survey.idle.sort(key=lambda seat: (-seat.priority, -seat.last_step))
        survey.busy.sort(key=lambda seat: -seat.number)
        return survey

    def _is_protected(self, seat: Seat, now: float) -> bool:
        came_back = self._came_back.get(seat)
        if came_back is None:
            return False
        since, steps = came_back
        if now - since < _LEAST_SECONDS and seat.stats.steps - steps < _LEAST_STEPS:
            return True
        del self._came_back[seat]
        return False

    def _movable(self, seat: Seat) -> int:
        """How many pages of the pool are the inferlet's alone."""
        resident = seat.pages_held - seat.swapped
        if not resident or not self._pages.shared_pages:
            return resident
        state = (self._pages.sharings, seat.pages_held, seat.swapped)
        if seat.movable[0] != state:
            seat.movable = (state, len(self._own_pages(seat)))
        return seat.movable[1]

    def _own_pages(self, seat: Seat) -> list[int]:
        held = Counter(page for pages in _handles(seat) for page in pages if page >= 0)
        return [page for page, n in held.items() if self._pages.references(page) == n]

    # --- moving ---------------------------------------------------------------

    def _swap_out(self, seat: Seat, wanted: int, builder: StepBuilder) -> None:
        """At least `wanted` pages go, if the inferlet and host memory have so many."""
        own = self._own_pages(seat)[: min(max(wanted, _PORTION), self.places.available)]
        to = dict(zip(own, self.places.take(len(own)), strict=True))
        builder.swap_out(to)
        for page, place in to.items():
            _hand_over(self._pages, page, self.places, place)
        moved = _rename(seat, {page: in_host_memory(place) for page, place in to.items()})
        seat.swapped += moved
        seat.absent = True
        self._giving_way.pop(seat, None)
        self._survey.shrank(seat, len(own))
        self.out += len(own)

    def _bring_back(self, run: Run) -> bool:
        """True once all of the inferlet's pages will be there for what comes next in this step."""
        seat, pool = run.seat, self._pages
        away = {page for pages in _handles(seat) for page in pages if page < -1}
        if (held := seat.distinct_pages()) > pool.total:
            raise OutOfMemoryError(
                f"the {held} KV pages held, shared ones too, are more than the {pool.total} of "
                "this server",
                "free some",
            )
        if not self.has_pages(run, len(away)):
            return False
        to = dict(zip(away, pool.take(len(away)), strict=True))
        run.builder.swap_in({in_host_memory(there): page for there, page in to.items()})
        run.flight.keep(seat)  # a step moves pages out before others in
        for there, page in to.items():
            _hand_over(self.places, in_host_memory(there), pool, page)
        _rename(seat, to)
        run.cost += 2 * len(to) * run.machine.model.page_size * COST_OF_SLOT  # there and back
        seat.swapped = 0
        seat.absent = False
        self._came_back[seat] = (time.monotonic(), seat.stats.steps)
        self.back += len(to)
        return True


class _Survey:
    """Inferlets with pages that can move: `seats`, how many; each is in one of the lists."""

    def __init__(self) -> None:
        self.made = False
        self.seats: dict[Seat, int] = {}
        self.movable = 0  # all together
        self.idle: list[Seat] = []  # the first to go at the end
        self.busy: list[Seat] = []  # the newest first
        self.protected: list[Seat] = []  # they have just come back

    def grew(self, seat: Seat, pages: int) -> None:
        if self.made:
            self.seats[seat] = self.seats.get(seat, 0) + pages
            self.movable += pages

    def shrank(self, seat: Seat, pages: int) -> None:
        self.grew(seat, -pages)


def _is_idle(seat: Seat) -> bool:
    """It has asked for nothing that is not done, by a queue that is gone neither."""
    if seat.frames or seat.last_step > seat.landed:
        return False
    return not any(queue.commands for queue in seat.queues.values())


def _handles(seat: Seat) -> Iterator[array[int]]:
    return (block.pages for block in seat.kvs.values())


def _hand_over(source: PagePool, old: int, target: PagePool, new: int) -> None:
    """All references to `old` are references to `new`, which has one, instead."""
    for _ in range(source.references(old) - 1):
        source.release(old)
        target.retain(new)
    source.release(old)


def _rename(seat: Seat, names: dict[int, int]) -> int:
    """Puts new pages or places for old ones in all that names them; how many in handles."""
    count = 0
    for pages in _handles(seat):
        for i, page in enumerate(pages):
            if page in names:
                pages[i] = names[page]
                count += 1
    for queue in seat.queues.values():
        if queue.current is not None and (run := queue.current.pages) is not None:
            queue.current.pages = array("i", [names.get(page, page) for page in run])
    return count
