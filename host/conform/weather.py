"""What a weather is: it decides how the frames of one recorded run travel.

It sits in the tap (`host/tap.py`). What the tap records is what the inferlet said and was told.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

import msgspec
from inferlet.abi import Startup

from ..frames import frame


class Ends(Protocol):
    """The two ends of the connection."""

    def to_controller(self, octets: bytes) -> None: ...

    def tell(self, body: bytes) -> None:
        """The inferlet is about to have all of this frame."""

    def to_inferlet(self, octets: bytes) -> None: ...

    def has_read_all(self) -> bool:
        """The inferlet has taken every octet written to it."""

    def cut(self) -> None:
        """The connection is no more, for either."""


class Weather:
    """Fair: all passes as it comes. Others override what they change. One serves one run."""

    ends: Ends

    def start(self, ends: Ends) -> None:
        self.ends = ends

    def startup(self, startup: Startup) -> bytes:
        """The start-up block."""
        return msgspec.msgpack.encode(startup)

    def from_inferlet(self, body: bytes) -> None:
        self.ends.to_controller(frame(body))

    def from_controller(self, body: bytes) -> None:
        self.ends.tell(body)
        self.ends.to_inferlet(frame(body))

    def close(self) -> None:
        """The inferlet is dead."""


class Holding(Weather):
    """Holds answers back until the inferlet has said nothing for a while: it waits, most likely."""

    QUIET: Final = 0.01  # seconds
    MOST: Final = 1.0  # seconds since the first one held
    MOST_OCTETS: Final = 1 << 18

    def __init__(self) -> None:
        self._held: list[bytes] = []
        self._octets = 0
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def from_inferlet(self, body: bytes) -> None:
        super().from_inferlet(body)
        self.wait()

    def from_controller(self, body: bytes) -> None:
        self.hold(body)

    def hold(self, body: bytes) -> None:
        if not self._held:
            self._since = asyncio.get_running_loop().time()
        self._held.append(body)
        self._octets += len(body)
        self.wait()

    def wait(self) -> None:
        """Something happened: what is held waits anew."""
        if not self._held:
            return
        self.close()
        loop = asyncio.get_running_loop()
        left = self._since + self.MOST - loop.time()
        quiet = 0.0 if self._octets > self.MOST_OCTETS else min(self.QUIET, max(0.0, left))
        self._timer = loop.call_later(quiet, self._release)

    def _release(self) -> None:
        held, self._held, self._octets = self._held, [], 0
        self.release(held)

    def release(self, held: list[bytes]) -> None:
        """All of it at once."""
        for body in held:
            self.ends.tell(body)
        self.ends.to_inferlet(b"".join(map(frame, held)))

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
