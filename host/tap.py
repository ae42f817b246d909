"""Sits between one inferlet and the controller, passes on what either says, and records it.

An inferlet is launched with one only if its run is recorded. Octets pass as they are; they are
looked into only to know where a frame ends, which answers tell of data in the rings, and which
commands refer to some. What waits here is bounded: of the side whose octets nobody takes, no more
are read.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
from collections.abc import Callable
from typing import Final

import msgspec
from inferlet import abi

from piehost.host.shm import RingReader
from piehost.wire.recording import FromInferlet, Garbage, ToInferlet, Written

from .conform.weather import Weather
from .frames import BadFraming, commands_of, next_frame
from .recording import Recorder
from .ring_places import Claims, Place, RingPlaces, hull, union
from .rings import Rings

_READ_BYTES: Final = 1 << 16
_MOST_WAITING: Final = 1 << 18  # octets; above it nothing more is read for that side

_decode_answers: Final = msgspec.msgpack.Decoder(list[list[msgspec.Raw]]).decode
_decode_number: Final = msgspec.msgpack.Decoder(int).decode


class Tap:
    """`inferlet_end` and `controller_end` are the sockets for the two; the maker closes them when
    it has passed them on."""

    def __init__(
        self,
        recorder: Recorder,
        startup: abi.Startup,
        rings: Rings,
        weather: Weather | None = None,
    ) -> None:
        """`weather` decides what becomes of the frames; without one they pass as they are.
        OSError if descriptors are used up."""
        self._recorder = recorder
        self._places = RingPlaces(startup)
        self._claims: Claims[Place] = Claims(hull)
        with contextlib.ExitStack() as on_error:
            self._ring_out = RingReader(rings.out, rings.sizes.out)
            on_error.callback(self._ring_out.close)
            self._ring_in = RingReader(rings.into, rings.sizes.into)
            on_error.callback(self._ring_in.close)
            ours, self.inferlet_end = map(on_error.enter_context, socket.socketpair())
            other, self.controller_end = map(on_error.enter_context, socket.socketpair())
            on_error.pop_all()
        self._inferlet = _Side(ours, self._from_inferlet)
        self._controller = _Side(other, self._from_controller)
        self._inferlet.start(self._controller)
        self._controller.start(self._inferlet)
        self._weather = weather
        if weather is not None:
            weather.start(self)

    def written(self, stream: int, data: bytes) -> None:
        """The process wrote this to its stdout (1) or stderr (2)."""
        self._recorder.add(Written(stream, data))

    def finish(self, then: Callable[[], None], wait: bool) -> None:
        """The process is dead. `then` is called when the controller has got the last it wrote; at
        once unless it is to `wait` for a controller that is slow."""

        def over() -> None:
            self._controller.close()
            self._ring_out.close()
            self._ring_in.close()
            then()

        self._inferlet.read_rest()
        self._inferlet.close()
        if self._weather is not None:
            self._weather.close()
        self._controller.refuse()
        if not wait:
            self._controller.drop()
        self._controller.end(over)

    # --- from the inferlet ---------------------------------------------------------------------

    def _from_inferlet(self, data: bytearray) -> int:
        """How much of `data` is taken. What is left at its end, or is no frame, is garbage."""
        at = passed = 0
        try:
            while (place := next_frame(data, at)) is not None:
                at = place[1]
                body = bytes(data[place[0] : at])
                self._commands(body)
                if self._weather is not None:
                    self._weather.from_inferlet(body)
                    passed = at
        except BadFraming:
            self._inferlet.refuse()  # the controller is about to end it
        else:
            if not self._inferlet.at_end:
                self._controller.write(data[passed:at])
                return at
        if len(data) > at:
            self._recorder.add(Garbage(bytes(data[at:])))
        self._controller.write(data[passed:])
        if self._inferlet.at_end:
            self._controller.end()
        return len(data)

    def _commands(self, body: bytes) -> None:
        places = []
        # a body that is no commands ends the inferlet; what the ring holds does not matter then
        for command in commands_of(body) or ():
            self._claims.add(command, self._places.out(command))
            if (place := self._places.into(command)) is not None:
                places.append(place)
        self._recorder.add(FromInferlet(body, _copies(self._ring_in, places)))

    # --- from the controller -------------------------------------------------------------------

    def _from_controller(self, data: bytearray) -> int:
        at = 0
        while (place := next_frame(data, at)) is not None:
            at = place[1]
            body = bytes(data[place[0] : at])
            if self._weather is not None:
                self._weather.from_controller(body)
            else:
                self.tell(body)
        if self._weather is None:
            self._inferlet.write(data[:at])
        if self._controller.at_end:
            self._inferlet.end()
            self._inferlet.refuse()
        return at

    # --- for a weather -------------------------------------------------------------------------

    def to_controller(self, octets: bytes) -> None:
        self._controller.write(octets)

    def to_inferlet(self, octets: bytes) -> None:
        self._inferlet.write(octets)

    def has_read_all(self) -> bool:
        return self._inferlet.is_read_out

    def cut(self) -> None:
        self._inferlet.end()
        self._inferlet.refuse()
        self._controller.refuse()
        self._controller.end()

    def tell(self, body: bytes) -> None:
        """The frame `body` of answers goes to the inferlet."""
        places: list[Place] = []
        for _, request, *_ in _decode_answers(body):
            places += self._claims.take(_decode_number(request))
        self._recorder.add(ToInferlet(body, _copies(self._ring_out, places)))


def _copies(ring: RingReader, places: list[Place]) -> list[tuple[int, bytes]]:
    copies = ((offset, ring.read(offset, octets)) for offset, octets in union(places))
    return [(offset, data) for offset, data in copies if data is not None]


class _Side:
    """One of the two sockets: what came from it and is not a whole frame yet, and what it has not
    taken yet. `take` is given the former and tells how much of it is done with."""

    def __init__(self, sock: socket.socket, take: Callable[[bytearray], int]) -> None:
        sock.setblocking(False)
        self.at_end = False  # nothing more comes from it
        self._sock = sock
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._partial = bytearray()
        self._waiting = bytearray()
        self._reads = False  # the loop watches it
        self._writes = False
        self._ends = False  # nothing more goes to it than what waits
        self._then: Callable[[], None] | None = None
        self._other: _Side | None = None

    def start(self, other: _Side) -> None:
        """Reads from now on, as long as `other` takes what it says."""
        self._other = other
        self._watch()

    # --- in ------------------------------------------------------------------------------------

    def _watch(self) -> None:
        other = self._other
        reads = not self.at_end and other is not None and len(other._waiting) <= _MOST_WAITING
        if reads and not self._reads:
            self._loop.add_reader(self._sock, self._readable)
        elif self._reads and not reads:
            self._loop.remove_reader(self._sock)
        self._reads = reads

    def _readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._read()
        self._watch()

    def _read(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
        except ConnectionError:  # it went, with octets of ours unread
            data = b""
        self.at_end = not data
        self._partial += data
        del self._partial[: self._take(self._partial)]

    def read_rest(self) -> None:
        """Reads what it said last. It can say no more."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)  # what was written before is still read
            while not self.at_end:
                self._read()
        self._watch()

    def refuse(self) -> None:
        """Reads no more of it; its writes fail."""
        self.at_end = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)
        self._watch()

    # --- out -----------------------------------------------------------------------------------

    @property
    def is_read_out(self) -> bool:
        """Nothing waits for it, here or in the socket."""
        if self._waiting or self._sock.fileno() < 0:
            return not self._waiting
        octets = struct.pack("i", 0)
        (unread,) = struct.unpack("i", fcntl.ioctl(self._sock, termios.TIOCOUTQ, octets))
        return bool(unread == 0)

    def write(self, data: bytes | bytearray) -> None:
        if not self._ends:
            self._waiting += data
            self._flush()

    def end(self, then: Callable[[], None] | None = None) -> None:
        """Once it has taken all, or can take no more, it sees the end, and `then` is called."""
        self._ends = True
        self._then = then
        self._flush()

    def _flush(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: self._sock.send(self._waiting)]
        except BlockingIOError:
            pass
        except OSError:  # it is gone
            self._waiting.clear()
        if bool(self._waiting) != self._writes:
            self._writes = not self._writes
            if self._writes:
                self._loop.add_writer(self._sock, self._flush)
            else:
                self._loop.remove_writer(self._sock)
        if self._other is not None:
            self._other._watch()
        if self._ends and not self._waiting:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
            then, self._then = self._then, None
            if then is not None:
                then()

    def drop(self) -> None:
        """What waits for it is lost."""
        self._waiting.clear()
        self._flush()

    def close(self) -> None:
        self.at_end = True
        self.drop()
        self._other = None
        self._watch()
        self._sock.close()
