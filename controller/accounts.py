"""What each user has had of the accelerator and of the controller, so that both are shared out.

Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996, section 2), over tokens as the Virtual
Token Counter has it (Sheng et al., OSDI 2024): who has had least, by share, is next, and who comes
back from idling starts where those who stayed are now, so that nothing is saved up.

A virtual time is what one had so far: of the accelerator in `Run.cost` (1 is about a token of a
prompt), of the controller in seconds. A user's is divided by the share of the inferlet it was for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .seat import Seat
    from .tables import Queue

_REMEMBERED: Final = 256  # users without inferlets, so that a new one does not start afresh


class Account:
    """One user's."""

    __slots__ = (
        "number",
        "ready",
        "seats",
        "served",
        "served_until",
        "spent",
        "turn",
        "worked",
        "worked_until",
    )

    def __init__(self, number: int) -> None:
        self.number = number  # settles ties
        self.seats = 0
        self.ready: dict[Queue, None] = {}  # the batcher's
        self.served = 0.0  # of the accelerator
        self.served_until = 0.0  # where the inferlet served last had been
        self.worked = 0.0  # of the controller
        self.worked_until = 0.0
        self.turn = 0  # the turn of the loop
        self.spent = 0.0  # in which it had so many seconds


class Accounts:
    """All users by name."""

    def __init__(self) -> None:
        self.served_until = 0.0  # where the user served last had been
        self.worked_until = 0.0
        self._accounts: dict[str, Account] = {}
        self._number = 0

    def enter(self, user: str) -> Account:
        """An inferlet of that name more."""
        account = self._accounts.get(user)
        if account is None:
            self._number += 1
            account = self._accounts[user] = Account(self._number)
        account.seats += 1
        return account

    def leave(self, seat: Seat) -> None:
        """The inferlet has ended."""
        seat.account.seats -= 1
        if not seat.account.seats:
            self._accounts[seat.user] = self._accounts.pop(seat.user)  # the latest to become idle
            idle = [user for user, account in self._accounts.items() if not account.seats]
            for user in idle[:-_REMEMBERED]:
                del self._accounts[user]

    def serve(self, seat: Seat, cost: float) -> None:
        """The inferlet got so much of the accelerator."""
        account = seat.account
        if account.served > self.served_until:
            self.served_until = account.served
        if seat.served > account.served_until:
            account.served_until = seat.served
        account.served += cost / seat.share
        seat.served += cost
        seat.allowance.earn()

    def wake(self, seat: Seat) -> None:
        """The inferlet has something for the accelerator again. Called before it is in `ready`."""
        account = seat.account
        if account.served < self.served_until and not account.ready:
            account.served = self.served_until
        if seat.served < account.served_until:
            seat.served = account.served_until

    def lift(self, account: Account) -> None:
        """The user asked for nothing that it could have had, so it has saved up nothing."""
        if account.served < self.served_until:
            account.served = self.served_until
