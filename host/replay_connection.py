"""Our end of a replayed program's connection: what came over it, and what it has not taken yet."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import Final

from piehost.host.shm import RingReader

from .frames import BadFraming, commands_of, next_frame
from .replay_script import Asked, Bad
from .ring_places import RingPlaces

_READ_BYTES: Final = 1 << 16


class Connection:
    """`came` is for its user to take from; while something is left there, nothing more is read."""

    def __init__(
        self,
        sock: socket.socket,
        ring_in: RingReader,
        places: RingPlaces,
        heard: Callable[[], None],
        taken: Callable[[], None],
    ) -> None:
        """`heard` is called when something has come, its end maybe, `taken` when the program has
        taken some of what waits. Neither before `watch`."""
        self.came: deque[Asked | Bad] = deque()
        self.at_end = False  # it can say nothing more
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._ring_in = ring_in
        self._places = places
        self._heard = heard
        self._taken = taken
        self._partial = bytearray()
        self._waiting = bytearray()
        sock.setblocking(False)

    @property
    def waiting(self) -> int:
        """Octets of answers that it has not taken."""
        return len(self._waiting)

    def watch(self) -> None:
        """To be called again whenever `came` was taken from, or something told."""
        if self.at_end or self.came:
            self._loop.remove_reader(self._sock)
        else:
            self._loop.add_reader(self._sock, self._readable)
        if self._waiting:
            self._loop.add_writer(self._sock, self._writable)
        else:
            self._loop.remove_writer(self._sock)

    def stop_watching(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)

    def tell(self, frames: bytes) -> None:
        self._waiting += frames
        self._write()

    def hang_up(self) -> None:
        """As the controller does when something came that the ABI does not allow."""
        self.at_end = True
        self.came.clear()
        self._sock.shutdown(socket.SHUT_RDWR)

    def read_out(self) -> None:
        """The program is dead: what it wrote before has come from here on."""
        self._waiting.clear()
        self._sock.shutdown(socket.SHUT_RD)
        while not self.at_end:
            self._read()

    def _readable(self) -> None:
        if self._read():
            self._heard()

    def _read(self) -> bool:
        """Whether there was something."""
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return False
        except ConnectionError:  # it died with answers unread
            data = b""
        self.at_end = not data
        self._partial += data
        at = 0
        try:
            while (body := next_frame(self._partial, at)) is not None:
                at = body[1]
                self._arrived(bytes(self._partial[body[0] : at]))
            bad = self.at_end and len(self._partial) > at
        except BadFraming:
            bad = True
        if bad:
            self.came.append(Bad(bytes(self._partial[at:])))
            self.at_end = True
        del self._partial[:at]
        return True

    def _arrived(self, body: bytes) -> None:
        commands = commands_of(body)
        if commands is None:
            self.came.append(Bad(body))
            return
        for command in commands:
            place = self._places.into(command)
            self.came.append(Asked(command, self._ring_in.read(*place) if place else None))

    def _write(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: self._sock.send(self._waiting)]
        except BlockingIOError:
            pass
        except OSError:  # it does not listen any more
            self._waiting.clear()

    def _writable(self) -> None:
        self._write()
        self._taken()
