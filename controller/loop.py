"""The controller's loop: read what arrived, send the next step, flush the answers.

One thread, one epoll. The host link brings inferlets and their clients' messages, the backend link
brings finished steps, every other descriptor is an inferlet.
"""

from __future__ import annotations

import math
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Final

from inferlet.errors import InferletError, QuotaError
from tokenizers import Tokenizer

from piehost.wire import control
from piehost.wire.control import ControllerToHost, HostToController, SeatStats
from piehost.wire.link import Link, LinkClosed
from piehost.wire.step import Step, StepDone

from .accounts import Accounts
from .attention import Attention
from .batcher import Batcher
from .chat import Text
from .exports import Exports
from .machine import Machine
from .pools import PagePool, RowPool
from .report import report
from .requests import Requests
from .seat import MAX_BACKLOG_BYTES, Seat
from .swapping import Swapping
from .turns import TURN_SECONDS, Turns

if TYPE_CHECKING:
    from collections.abc import Callable

# what inferlets have received is reported to the host in portions of this size
TAKEN_MESSAGES: Final = 64
TAKEN_BYTES: Final = 1 << 16
_MOST_WAIT: Final = 3600.0  # seconds; epoll takes no more than 24 days, which leases may exceed


class Controller:
    """`configure` builds the machine of this server."""

    def __init__(
        self,
        host: Link[HostToController],
        backend: Link[StepDone],
        configure: control.Configure,
        tokenizer: Tokenizer,
    ) -> None:
        self._host = host
        self._backend = backend
        pages = PagePool(configure.pages)
        self._exports = Exports(pages)
        self._seats: dict[int, Seat] = {}
        places = PagePool(configure.swap_pages)
        self._swapping = Swapping(pages, places, self._exports, self._seats, self._end)
        machine = Machine(
            configure.model,
            pages,
            RowPool(configure.rows),
            configure.scratch_slots,
            self._exports,
            self._swapping,
        )
        self._accounts = Accounts()
        self._batcher = Batcher(
            machine,
            self._accounts,
            configure.policy,
            configure.step_tokens,
            configure.chunk_tokens,
        )
        text = Text(tokenizer, configure.model, configure.special_tokens)
        self._requests = Requests(self._batcher, text, self._to_host, self._end)
        self._turns = Turns(self._accounts)
        self._attention = Attention(self._batcher)
        self._slowed: dict[Seat, float] = {}  # those whose rate holds them up, and until when
        self._outgoing: set[Seat] = set()
        self._epoll = select.epoll()
        self._backend_full = False
        self._host_writable = select.poll()
        self._host_writable.register(host.fileno(), select.POLLOUT)
        self._readers: dict[int, Callable[[int], None]] = {}
        self._watch(host.fileno(), self._from_host)
        self._watch(backend.fileno(), self._from_backend)

    def run(self) -> None:
        """Until the host goes: LinkClosed."""
        while True:
            arrived = self._epoll.poll(self._timeout())
            self._turns.turn += 1
            self._attention.begin_turn()
            self._batcher.begin_turn()
            for fd, events in arrived:
                if (reader := self._readers.get(fd)) is not None:
                    reader(events)
            if self._slowed or self._attention.held:
                self._resume()
            if self._turns.line:
                self._go_on()
            self._exports.expire()
            while (step := self._batcher.next_step()) is not None:
                self._to_backend(step)
            self._flush()

    # --- the inferlets --------------------------------------------------------

    def _from_seat(self, seat: Seat, events: int) -> None:
        if events & select.EPOLLOUT:
            seat.drain()
            if not seat.has_backlog:
                self._watch_seat(seat)
        if events & ~select.EPOLLOUT and not self._waits(seat):
            self._hear(seat)

    def _hear(self, seat: Seat) -> None:
        """It has something to say, or is to go on: now, or when its turn comes."""
        if self._turns.heard(seat):
            self._serve(seat)
        else:
            self._turns.join(seat)
            self._watch_seat(seat)

    def _serve(self, seat: Seat) -> bool:
        """One turn's share of what it says: of what is left, or has arrived. False if nothing."""
        if seat.allowance.left <= 0 and self._attention.holds(seat, time.monotonic()):
            self._watch_seat(seat)
            return False
        began = time.perf_counter()
        frames = seat.frames
        if not frames:
            try:
                arrived = seat.read()
            except EOFError:
                self._close(seat)
                return False
            if arrived is None:
                self._watch_seat(seat)
                return False
            frames = arrived
            seat.stats.commands += sum(map(len, frames))
        if seat.pace is None or seat.leaving:
            seat.frames = left = self._requests.take(seat, frames, began)
        else:
            left, rest = self._requests.take_paced(seat, seat.pace, frames, began)
            seat.frames = left + rest
            if rest and not (left or seat.closed):
                due = seat.pace.commands_due(sum(map(len, rest)), time.monotonic())
                self._slowed[seat] = due
        seconds = time.perf_counter() - began
        self._turns.spend(seat, seconds)
        self._attention.spent(seat, seconds, time.monotonic())
        if seat.closed:
            return True
        if left:
            self._turns.join(seat)
        if seat.frames or not seat.watched & select.EPOLLIN:
            self._watch_seat(seat)
        if seat.broken is not None and not seat.frames:
            self._end(seat, seat.broken)
        return True

    def _resume(self) -> None:
        """Those whose rate, or whose share of the controller, lets them go on."""
        now = time.monotonic()
        for seat in self._attention.over(now):
            if seat.leaving:
                self._turns.join(seat)  # `_go_on` releases it
            elif not seat.closed:
                self._hear(seat)
        for seat in [seat for seat, until in self._slowed.items() if until <= now]:
            if self._slowed.pop(seat, None) is not None:  # else one before it had it ended
                self._hear(seat)

    def _go_on(self) -> None:
        """A turn for those in line: all together no more than one's share, so that many of them
        hold up others no longer than one does."""
        over = time.perf_counter() + TURN_SECONDS
        while (seat := self._turns.next()) is not None:
            self._serve(seat)
            if seat.leaving and not (seat.in_line or seat in self._attention.held):
                self._release(seat.number)
            if time.perf_counter() > over:
                return

    def _watch_seat(self, seat: Seat) -> None:
        """Nothing more is read while something of it waits, so that whoever asks for too much is
        held up by its own socket. Then epoll is not to tell of its end over and over either."""
        reading = 0 if self._waits(seat) else select.EPOLLIN
        events = reading | (select.EPOLLOUT if seat.has_backlog else 0)
        if events == seat.watched:
            return
        fd = seat.sock.fileno()
        if not events:
            self._epoll.unregister(fd)
        elif seat.watched:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        seat.watched = events

    def _waits(self, seat: Seat) -> bool:
        """Something of it does, so that nothing more is to be read."""
        return bool(seat.frames) or seat.in_line or seat in self._attention.held

    def _flush(self) -> None:
        if not self._outgoing:
            return
        now = time.monotonic()
        for seat in [s for s in self._outgoing if s.due() <= now]:
            self._outgoing.discard(seat)
            seat.flush()
            if seat.taken >= TAKEN_MESSAGES or seat.taken_bytes >= TAKEN_BYTES:
                self._to_host(control.Taken(seat.number, seat.taken, seat.taken_bytes))
                seat.taken = seat.taken_bytes = 0
            if seat.overflowing:
                self._end(
                    seat,
                    QuotaError(
                        f"{MAX_BACKLOG_BYTES} octets of answers wait unread", "read your answers"
                    ),
                )
            elif seat.has_backlog and not seat.closed:
                self._watch_seat(seat)

    def _timeout(self) -> float:
        """Seconds until a held-back answer, the end of a lease or of a rate's hold is due; -1 is
        for ever."""
        if self._turns.line or self._batcher.has_turn_waiting:
            return 0
        due = min((seat.due() for seat in self._outgoing), default=math.inf)
        due = min(due, self._exports.next_expiry, self._swapping.retry_at)
        if self._slowed or self._batcher.slowed:
            due = min(due, *self._slowed.values(), *self._batcher.slowed.values())
        if self._attention.held:
            due = min(due, self._attention.due(time.monotonic()))
        return -1 if due == math.inf else min(max(0.0, due - time.monotonic()), _MOST_WAIT)

    def _end(self, seat: Seat, error: InferletError) -> None:
        """Ends an inferlet for cause; the host kills its process and says why."""
        self._to_host(control.End(seat.number, error.name, error.message, error.hint))
        self._close(seat)  # after: a program that exits at its connection's end did not end itself

    def _close(self, seat: Seat) -> None:
        """Frees all that the inferlet held. Its counters stay until the host releases it."""
        if seat.closed:
            return
        seat.closed = True
        self._outgoing.discard(seat)
        self._slowed.pop(seat, None)
        self._attention.held.pop(seat, None)
        fd = seat.sock.fileno()
        del self._readers[fd]
        if seat.watched:
            self._epoll.unregister(fd)
        seat.sock.close()
        self._free(seat)
        self._requests.forget(seat)

    def _free(self, seat: Seat) -> None:
        self._batcher.forget(seat.queues.values())
        self._batcher.machine.free_seat(seat)

    # --- the host -------------------------------------------------------------

    def _from_host(self, events: int) -> None:
        for message, fds in self._host.receive():
            match message:
                case control.Admit():
                    self._admit(message, fds[0])
                case control.Release():
                    self._release(message.seat)
                case control.Deliver():
                    if (seat := self._seats.get(message.seat)) is not None and not seat.closed:
                        seat.inbox.put(message.data, len(message.data))
                case control.CloseInput():
                    if (seat := self._seats.get(message.seat)) is not None:
                        seat.inbox.close()
                case control.Reply():
                    self._requests.reply(message)
                case control.ChildEnded():
                    self._requests.child_ended(message)
                case control.SetLimits():
                    if (seat := self._seats.get(message.seat)) is not None:
                        self._set_limits(seat, message)
                case control.AskStats():
                    self._to_host(
                        report(
                            message,
                            self._seats,
                            self._batcher,
                            self._requests,
                            self._slowed,
                            self._attention.held,
                        )
                    )
                case _:
                    raise ValueError(f"the host sent {type(message).__name__} out of turn")
        self._reach_host()  # with answers to pings

    def _admit(self, message: control.Admit, fd: int) -> None:
        sock = socket.socket(fileno=fd)
        seat = Seat(message, self._accounts.enter(message.user), sock, self._outgoing)
        if (parent := self._seats.get(message.parent)) is not None:
            seat.allowance = parent.allowance
        self._seats[seat.number] = seat
        self._requests.admitted(seat, message)
        self._watch(fd, lambda events: self._from_seat(seat, events))

    def _set_limits(self, seat: Seat, message: control.SetLimits) -> None:
        seat.set_limits(message.limits)
        self._batcher.set_rates(seat, message.rates)
        if self._slowed.pop(seat, None) is not None:
            self._hear(seat)  # it may be held up again

    def _release(self, number: int) -> None:
        """The process is dead: what it wrote last still counts. If that takes several turns
        (`_go_on` comes back here), what it held is freed before."""
        seat = self._seats.get(number)
        stats = SeatStats()
        if seat is not None:
            freed, seat.leaving = seat.leaving, True
            self._slowed.pop(seat, None)
            self._attention.held.pop(seat, None)
            if not self._drained(seat):
                if not freed:
                    self._free(seat)
                if seat not in self._attention.held:
                    self._turns.join(seat)
                self._watch_seat(seat)
                return
            seat.leaving = False
            self._close(seat)
            del self._seats[number]
            self._accounts.leave(seat)
            seat.count_slowed(time.monotonic())
            stats = seat.stats
        self._to_host(control.Released(number, stats))

    def _drained(self, seat: Seat) -> bool:
        """Carries out what it wrote, up to its end-of-file. False if there is more for another
        turn."""
        while not seat.closed:
            if not self._turns.heard(seat):
                return False
            if not self._serve(seat):
                return seat not in self._attention.held
        return True

    def _to_host(self, message: ControllerToHost) -> None:
        self._host.send(message)
        self._reach_host()

    def _reach_host(self) -> None:
        while self._host.backlog:  # it is trusted and reads soon; do not pile up
            self._host_writable.poll()
            self._host.flush()

    # --- the backend ----------------------------------------------------------

    def _to_backend(self, step: Step) -> None:
        try:
            self._backend.send(step)
        except LinkClosed:
            self._backend_gone()
        else:
            self._watch_backlog()

    def _watch_backlog(self) -> None:
        """Asks to be told when the backend has room for the rest of a large step."""
        if self._backend.backlog != self._backend_full:
            self._backend_full = self._backend.backlog
            events = select.EPOLLIN | (select.EPOLLOUT if self._backend_full else 0)
            self._epoll.modify(self._backend.fileno(), events)

    def _from_backend(self, events: int) -> None:
        try:
            if events & select.EPOLLOUT:
                self._backend.flush()
                self._watch_backlog()
            for answer, _ in self._backend.receive():
                self._batcher.done(answer, time.monotonic())
        except LinkClosed:
            self._backend_gone()

    def _backend_gone(self) -> None:
        self._unwatch(self._backend.fileno())
        self._batcher.lose_backend()
        self._to_host(control.BackendLost())

    # --- descriptors ----------------------------------------------------------

    def _watch(self, fd: int, reader: Callable[[int], None]) -> None:
        os.set_inheritable(fd, False)
        self._readers[fd] = reader
        self._epoll.register(fd, select.EPOLLIN)

    def _unwatch(self, fd: int) -> None:
        del self._readers[fd]
        self._epoll.unregister(fd)
