"""Whom a seat tells of its life: its host, and whoever the inferlet runs for (`owners.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from .conform.weather import Weather
from .errors import HostError
from .recording import Recorder

if TYPE_CHECKING:
    from .seats import Seat


class SeatListener(Protocol):
    """What a seat tells its host."""

    def seat_dead(self, seat: Seat) -> None:
        """Its process is gone, or never was: what it held can be freed."""

    def seat_done(self, seat: Seat) -> None:
        """The last call: `seat.result()` is final."""


class Owner(Protocol):
    """Who an inferlet runs for. Told `refused`, or `admitted`, perhaps `started`, and `done`."""

    child: int  # the number of the `Spawn` that it was started for, if a parent did

    @property
    def parent(self) -> Seat | None: ...

    @property
    def seat(self) -> Seat | None:
        """None until it is admitted."""

    @property
    def client_pid(self) -> int: ...

    @property
    def recorder(self) -> Recorder | None:
        """What its run is recorded with."""

    @property
    def weather(self) -> Weather | None:
        """How the connection of a recorded run behaves; None: as ever."""

    def refused(self, error: HostError) -> None:
        """It was never admitted, and will not be."""

    def admitted(self, seat: Seat) -> None:
        """The controller knows of it."""

    def started(self, seat: Seat) -> None:
        """Its process runs."""

    def output(self, stream: int, data: bytes) -> None: ...

    def done(self, seat: Seat) -> None:
        """`seat.result()` is final."""
