"""Messages in order on one side, requests that wait for them on the other; never both at once.

The client's messages to an inferlet, those between parent and child, and those of a subscription
all wait in one of these.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from inferlet.errors import ArgumentError, ClosedError, InferletError, QuotaError

if TYPE_CHECKING:
    from .seat import Seat

MAX_WAITING_BYTES: Final = 1 << 20  # of messages that wait together, and of answers unread
OVERHEAD: Final = 256  # octets that a message counts for beside its data


class Held:
    """Octets that wait in one mailbox, or together in several."""

    __slots__ = ("octets",)

    def __init__(self) -> None:
        self.octets = 0


class Mailbox:
    """`held` counts what waits here, `end` is what a reader is told once it is closed."""

    def __init__(self, held: Held, end: str) -> None:
        self.held = held
        self.open = True
        self._end = end
        self._messages: deque[tuple[object, int]] = deque()  # value, or an error; its octets
        self._receivers: deque[tuple[Seat, int]] = deque()  # who waits, under which request id

    def has_room(self, octets: int) -> bool:
        """Whether a message of that many octets keeps to MAX_WAITING_BYTES, the answers that its
        reader has not taken included."""
        unread = self._receivers[0][0].unread if self._receivers else 0
        return self.held.octets + unread + octets + OVERHEAD <= MAX_WAITING_BYTES

    def put(self, value: object, octets: int) -> None:
        """Hands the message over, or keeps it; an InferletError is raised at who reads it."""
        if self._receivers:
            seat, request = self._receivers.popleft()
            seat.waiting -= 1
            self._hand_over(seat, request, value, octets)
        else:
            self._messages.append((value, octets))
            self.held.octets += octets + OVERHEAD

    def receive(self, seat: Seat, request: int | None) -> None:
        """Answers with the next message, now or when there is one.

        ArgumentError without a request id, QuotaError, ClosedError.
        """
        if request is None:
            raise ArgumentError(
                "a receive without a request id", "give one: the message is its answer"
            )
        if self._messages:
            value, octets = self._messages.popleft()
            self.held.octets -= octets + OVERHEAD
            self._hand_over(seat, request, value, octets)
        elif self.open:
            wait(seat)
            self._receivers.append((seat, request))
        else:
            raise self._closed()

    def close(self, error: InferletError | None = None) -> None:
        """No more messages will come: those that wait can be read, then readers are told. Who
        waits now is told `error`, if there is one."""
        self.open = False
        while self._receivers:
            seat, request = self._receivers.popleft()
            seat.waiting -= 1
            seat.fail(request, error or self._closed())

    def drop(self, error: InferletError | None = None) -> None:
        """Closes it and forgets what waits."""
        self.held.octets -= sum(octets + OVERHEAD for _, octets in self._messages)
        self._messages.clear()
        self.close(error)

    @property
    def latest(self) -> object:
        """The message put last, if it still waits."""
        return self._messages[-1][0] if self._messages else None

    def _closed(self) -> ClosedError:
        return ClosedError(self._end, "stop receiving")

    def _hand_over(self, seat: Seat, request: int, value: object, octets: int) -> None:
        if isinstance(value, InferletError):
            seat.fail(request, value)
        else:
            seat.unsent += octets
            seat.answer(request, value)


class ClientMailbox(Mailbox):
    """Messages from the client: the host is told how many have been received."""

    def __init__(self) -> None:
        super().__init__(Held(), "the client will send no more messages")

    def _hand_over(self, seat: Seat, request: int, value: object, octets: int) -> None:
        seat.taken += 1
        seat.taken_bytes += octets
        super()._hand_over(seat, request, value, octets)


def wait(seat: Seat) -> None:
    """Counts one more request that waits for somebody else. QuotaError."""
    if seat.waiting >= seat.limits.commands:
        raise QuotaError(
            f"{seat.waiting} requests wait for messages", "wait for some of their answers first"
        )
    seat.waiting += 1
