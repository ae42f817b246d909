"""The controller's loop: read what arrived, send the next step, flush the answers.

One thread, one epoll. The host link brings inferlets and their clients' messages, the backend link
brings finished steps, every other descriptor is an inferlet.
"""

from __future__ import annotations

import os
import select
import socket
import time
from typing import TYPE_CHECKING, Final

from inferlet.errors import FrameError, InferletError, OutOfMemoryError, QuotaError
from tokenizers import Tokenizer

from piehost.wire import control
from piehost.wire.control import ControllerToHost, HostToController, SeatStats
from piehost.wire.link import Link, LinkClosed
from piehost.wire.step import Step, StepDone

from .batcher import Batcher
from .machine import Machine
from .pools import PagePool, RowPool
from .requests import Requests, no_more_input
from .seat import MAX_BACKLOG_BYTES, Seat

if TYPE_CHECKING:
    from collections.abc import Callable

# what inferlets have received is reported to the host in portions of this size
TAKEN_MESSAGES: Final = 64
TAKEN_BYTES: Final = 1 << 16


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
        machine = Machine(
            configure.model,
            PagePool(configure.pages),
            RowPool(configure.rows),
            configure.scratch_slots,
            self._make_room,
        )
        self._batcher = Batcher(machine, configure.policy, configure.chunk_tokens)
        self._requests = Requests(self._batcher, tokenizer, self._deliver)
        self._seats: dict[int, Seat] = {}
        self._outgoing: set[Seat] = set()
        self._epoll = select.epoll()
        self._backend_full = False
        self._readers: dict[int, Callable[[int], None]] = {}
        self._watch(host.fileno(), self._from_host)
        self._watch(backend.fileno(), self._from_backend)

    def run(self) -> None:
        """Until the host goes: LinkClosed."""
        while True:
            for fd, events in self._epoll.poll(self._timeout()):
                if (reader := self._readers.get(fd)) is not None:
                    reader(events)
            while (step := self._batcher.next_step()) is not None:
                self._to_backend(step)
            self._flush()

    # --- the inferlets --------------------------------------------------------

    def _from_seat(self, seat: Seat, events: int) -> None:
        if events & select.EPOLLOUT:
            seat.drain()
            if not seat.has_backlog:
                self._epoll.modify(seat.sock.fileno(), select.EPOLLIN)
        if events & ~select.EPOLLOUT:
            self._read(seat)

    def _read(self, seat: Seat) -> bool:
        """Carries out what has arrived. False if nothing had."""
        try:
            frames = seat.read()
            for frame in frames or ():
                self._requests.take(seat, frame)
                if seat.closed:
                    break
        except EOFError:
            self._close(seat)
        except FrameError as error:
            self._end(seat, error)
        else:
            return frames is not None
        return False

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
                self._epoll.modify(seat.sock.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _timeout(self) -> float:
        """Seconds until a held-back answer is due; -1 is for ever."""
        if not self._outgoing:
            return -1
        return max(0.0, min(seat.due() for seat in self._outgoing) - time.monotonic())

    def _deliver(self, seat: Seat, data: bytes) -> None:
        self._to_host(control.Sent(seat.number, data))

    def _end(self, seat: Seat, error: InferletError) -> None:
        """Ends an inferlet for cause; the host kills its process and says why."""
        self._close(seat)
        self._to_host(control.End(seat.number, error.name, error.message, error.hint))

    def _close(self, seat: Seat) -> None:
        """Frees all that the inferlet held. Its counters stay until the host releases it."""
        if seat.closed:
            return
        seat.closed = True
        self._outgoing.discard(seat)
        self._unwatch(seat.sock.fileno())
        seat.sock.close()
        self._batcher.forget(seat.queues.values())
        self._batcher.machine.free_seat(seat)

    def _make_room(self, pages: int, asker: Seat) -> bool:
        """Ends the newest inferlets that hold pages until `pages` are free (Pie, section 5.2).

        False if the asker itself was the newest.
        """
        pool = self._batcher.machine.pages
        while pool.free < pages:
            newest = max(
                (s for s in self._seats.values() if s.pages_held), key=_number, default=asker
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
                        self._hand_over(seat, message.data)
                case control.CloseInput():
                    if (seat := self._seats.get(message.seat)) is not None and not seat.closed:
                        seat.input_open = False
                        while seat.receivers:
                            seat.fail(seat.receivers.popleft(), no_more_input())
                case control.AskStats():
                    self._to_host(self._stats(message.request))
                case _:
                    raise ValueError(f"the host sent {type(message).__name__} out of turn")

    def _admit(self, message: control.Admit, fd: int) -> None:
        sock = socket.socket(fileno=fd)
        seat = Seat(message.seat, message.id, sock, message.limits, self._outgoing)
        self._seats[seat.number] = seat
        self._watch(fd, lambda events: self._from_seat(seat, events))

    def _release(self, number: int) -> None:
        """The process is dead: what it wrote last still counts, then all is freed."""
        seat = self._seats.pop(number, None)
        stats = SeatStats()
        if seat is not None:
            while not seat.closed and self._read(seat):
                pass  # up to its end-of-file
            self._close(seat)
            stats = seat.stats
        self._to_host(control.Released(number, stats))

    @staticmethod
    def _hand_over(seat: Seat, data: bytes) -> None:
        if seat.receivers:
            seat.hand_over(seat.receivers.popleft(), data)
        else:
            seat.messages.append(data)

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
