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

from inferlet.abi import AnyCommand
from inferlet.errors import InferletError, OutOfMemoryError, QuotaError
from tokenizers import Tokenizer

from piehost.wire import control
from piehost.wire.control import ControllerToHost, HostToController, SeatStats
from piehost.wire.link import Link, LinkClosed
from piehost.wire.step import Step, StepDone

from .batcher import Batcher
from .chat import Text
from .exports import Exports
from .machine import Machine
from .pools import PagePool, RowPool
from .requests import TURN_SECONDS, Requests
from .seat import MAX_BACKLOG_BYTES, Seat

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
        machine = Machine(
            configure.model,
            pages,
            RowPool(configure.rows),
            configure.scratch_slots,
            self._make_room,
            self._exports,
        )
        self._batcher = Batcher(machine, configure.policy, configure.chunk_tokens)
        text = Text(tokenizer, configure.model, configure.special_tokens)
        self._requests = Requests(self._batcher, text, self._to_host, self._end)
        self._seats: dict[int, Seat] = {}
        self._busy: dict[Seat, None] = {}  # those with more to do than one turn's share
        self._outgoing: set[Seat] = set()
        self._epoll = select.epoll()
        self._backend_full = False
        self._readers: dict[int, Callable[[int], None]] = {}
        self._watch(host.fileno(), self._from_host)
        self._watch(backend.fileno(), self._from_backend)

    def run(self) -> None:
        """Until the host goes: LinkClosed."""
        while True:
            arrived = self._epoll.poll(self._timeout())
            self._batcher.begin_turn()
            for fd, events in arrived:
                if (reader := self._readers.get(fd)) is not None:
                    reader(events)
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
        if events & ~select.EPOLLOUT and not seat.frames:
            self._read(seat)

    def _read(self, seat: Seat) -> bool:
        """Carries out what has arrived. False if nothing had."""
        try:
            frames = seat.read()
        except EOFError:
            self._close(seat)
            return False
        if frames is not None:
            seat.stats.commands += sum(map(len, frames))
            self._carry_out(seat, frames)
        return frames is not None

    def _carry_out(self, seat: Seat, frames: list[list[AnyCommand]]) -> None:
        """One turn's share of the frames. Nothing more is read while some are left, so that
        whoever asks for too much is held up by its own socket."""
        seat.frames = self._requests.take(seat, frames)
        if not seat.closed and bool(seat.frames) != (seat in self._busy):
            if seat.frames:
                self._busy[seat] = None
            else:
                del self._busy[seat]
            self._watch_seat(seat)
        if seat.broken is not None and not seat.frames and not seat.closed:
            self._end(seat, seat.broken)
        if seat.leaving and not seat.frames:
            self._release(seat.number)

    def _go_on(self) -> None:
        """A turn for those with frames left: the longest waiting first, and all together no more
        than one's share, so that many of them hold up others no longer than one does."""
        over = time.perf_counter() + TURN_SECONDS
        for seat in list(self._busy):
            if seat in self._busy:
                self._busy[seat] = self._busy.pop(seat)  # to the back
                self._carry_out(seat, seat.frames)
            if time.perf_counter() > over:
                return

    def _watch_seat(self, seat: Seat) -> None:
        reading = 0 if seat.frames else select.EPOLLIN
        writing = select.EPOLLOUT if seat.has_backlog else 0
        self._epoll.modify(seat.sock.fileno(), reading | writing)

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
        """Seconds until a held-back answer or the end of a lease is due; -1 is for ever."""
        if self._busy or self._batcher.has_turn_waiting:
            return 0
        due = min((seat.due() for seat in self._outgoing), default=math.inf)
        due = min(due, self._exports.next_expiry)
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
        self._busy.pop(seat, None)
        self._unwatch(seat.sock.fileno())
        seat.sock.close()
        self._free(seat)
        self._requests.forget(seat)

    def _free(self, seat: Seat) -> None:
        self._batcher.forget(seat.queues.values())
        self._batcher.machine.free_seat(seat)

    def _make_room(self, pages: int, asker: Seat) -> bool:
        """Ends exports whose exporter has ended, then the newest inferlets that hold or export
        pages (Pie, section 5.2), until `pages` are free. False if the asker was the newest."""
        pool = self._batcher.machine.pages
        while pool.free < pages:
            if self._exports.drop_orphan():
                continue
            exporters = self._exports.exporters()
            newest = max(
                (s for s in self._seats.values() if s.pages_held or s.number in exporters),
                key=_number,
                default=asker,
            )
            victim = asker if newest.number < asker.number else newest
            self._end(
                victim,
                OutOfMemoryError(
                    f"no KV page is free; an older inferlet goes first and this one held "
                    f"{victim.pages_held}",
                    "launch again later, or serve with more --kv-pages",
                ),
            )
            if victim is asker:
                return False
        return True

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
                case control.AskStats():
                    self._to_host(self._stats(message.request))
                case _:
                    raise ValueError(f"the host sent {type(message).__name__} out of turn")

    def _admit(self, message: control.Admit, fd: int) -> None:
        sock = socket.socket(fileno=fd)
        seat = Seat(message, sock, self._outgoing)
        self._seats[seat.number] = seat
        self._requests.admitted(seat, message)
        self._watch(fd, lambda events: self._from_seat(seat, events))

    def _release(self, number: int) -> None:
        """The process is dead: what it wrote last still counts. If that takes several turns
        (`_carry_out` comes back here), what it held is freed before."""
        seat = self._seats.get(number)
        stats = SeatStats()
        if seat is not None:
            seat.leaving = False
            while not seat.closed and not seat.frames and self._read(seat):
                pass  # up to its end-of-file
            if not seat.closed and seat.frames:
                seat.leaving = True
                self._free(seat)
                return
            self._close(seat)
            del self._seats[number]
            stats = seat.stats
        self._to_host(control.Released(number, stats))

    def _stats(self, request: int) -> control.Stats:
        total, machine = self._batcher.stats, self._batcher.machine
        total.seats = len(self._seats)
        total.pages_free, total.pages_total = machine.pages.free, machine.pages.total
        total.rows_free, total.rows_total = machine.rows.free, machine.rows.total
        for seat in self._seats.values():
            seat.stats.kv_pages = seat.pages_held
            seat.stats.embeds = seat.embeds_held
            seat.stats.queued = seat.queued
        return control.Stats(request, total, {n: s.stats for n, s in self._seats.items()})

    def _to_host(self, message: ControllerToHost) -> None:
        self._host.send(message)
        while self._host.backlog:  # it is trusted and reads soon; do not pile up
            select.select([], [self._host.fileno()], [])
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


def _number(seat: Seat) -> int:
    return seat.number
