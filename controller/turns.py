"""Whose commands are carried out next: the controller's own time, shared out between users.

An inferlet is heard as soon as it says something, until all of its user's had their share of this
turn of the loop. Then they wait in line: the user first who took the controller's time least, by
share, and of a user the inferlet that did (see `accounts.py`).
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING, Final

from .accounts import Account, Accounts

if TYPE_CHECKING:
    from .seat import Seat

# How long an inferlet's commands are carried out on the spot before others have their turn: about
# as long as a full frame of the plainest takes.
TURN_SECONDS: Final = 0.005
_PLAIN_SECONDS: Final = 0.0002  # a usual frame; all of a user's inferlets may send one in a turn


class Turns:
    """`turn` is the number of the loop's."""

    def __init__(self, accounts: Accounts) -> None:
        self.turn = 0
        self.line: dict[Account, list[tuple[float, int, Seat]]] = {}  # users, a heap for each
        self._accounts = accounts
        self._joined = 0

    def heard(self, seat: Seat) -> bool:
        """True if what the inferlet says now may be carried out at once."""
        user = seat.account
        if user in self.line:
            return False
        return user.turn != self.turn or user.spent < TURN_SECONDS + _PLAIN_SECONDS * user.seats

    def spend(self, seat: Seat, seconds: float) -> None:
        """The inferlet had the controller for so long."""
        user = seat.account
        if user.turn != self.turn:
            user.turn = self.turn
            user.spent = 0.0
        user.spent += seconds
        user.worked += seconds / seat.share
        seat.worked += seconds

    def join(self, seat: Seat) -> None:
        """It waits in line, unless it does already."""
        if seat.in_line:
            return
        seat.in_line = True
        user, accounts = seat.account, self._accounts
        line = self.line.get(user)
        if line is None:
            line = self.line[user] = []
            user.worked = max(user.worked, accounts.worked_until)
        seat.worked = max(seat.worked, user.worked_until)
        self._joined += 1
        heappush(line, (seat.worked, self._joined, seat))

    def next(self) -> Seat | None:
        """Takes the next one out of the line."""
        while self.line:
            user = min(self.line, key=_worked)
            line = self.line[user]
            worked, _, seat = heappop(line)
            if not line:
                del self.line[user]
            if not seat.closed or seat.leaving:
                self._accounts.worked_until = max(self._accounts.worked_until, user.worked)
                user.worked_until = max(user.worked_until, worked)
                seat.in_line = False
                return seat
        return None


def _worked(user: Account) -> tuple[float, int]:
    return user.worked, user.number
