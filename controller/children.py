"""Parents and children: messages between them, and the children's ends.

The host starts and ends the processes; messages pass through here alone. Towards the host a child
goes by a number that is never used twice, so that news of an earlier child is not taken for news of
the one that has its handle now.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final

from inferlet import abi
from inferlet.errors import (
    ArgumentError,
    ClosedError,
    HandleError,
    InferletError,
    QuotaError,
)

from piehost.wire import services

from .mailbox import MAX_WAITING_BYTES, Held, Mailbox, wait
from .seat import Seat, unused
from .services import Services

MIN_HANDLES: Final = 64  # of children, dead ones included; more if more may be alive


class Child:
    """What a parent and its child have in common."""

    __slots__ = ("code", "ended", "from_child", "number", "to_child", "waiters")

    def __init__(self, number: int) -> None:
        self.number = number  # what the host knows the child by
        self.to_child = Mailbox(Held(), "the parent will send no more messages")
        self.from_child = Mailbox(Held(), "the child will send no more messages")
        self.waiters: deque[tuple[Seat, int]] = deque()  # `wait_child`s: who, and request id
        self.code: int | None = None  # how it exited, once it has
        self.ended = False  # as far as its parent knows, or its parent has ended itself


class Children:
    """`end` ends an inferlet for cause."""

    def __init__(self, host: Services, end: Callable[[Seat, InferletError], None]) -> None:
        self._host = host
        self._end = end
        self._by_number: dict[int, Child] = {}  # those with a handle that have not ended
        self._number = 0
        self.handlers: dict[type[abi.Command], Callable[[Seat, Any], None]] = {
            abi.Spawn: self._spawn,
            abi.SendChild: self._send,
            abi.ReceiveChild: self._receive,
            abi.CloseChild: self._close_child,
            abi.WaitChild: self._wait,
            abi.EndChild: self._end_child,
        }

    # --- the child's side -----------------------------------------------------

    def admitted(self, seat: Seat, number: int) -> None:
        """A child begins: its messages are its parent's. Without a parent it has no input."""
        child = self._by_number.get(number)
        if child is None:  # the parent has ended it, or itself
            child = Child(number)
            child.ended = True
            child.to_child.close()
        seat.link = child
        seat.inbox = child.to_child

    def send_up(self, seat: Seat, child: Child, data: bytes) -> None:
        """A child's `send`. Ends it if its parent lets too much wait."""
        if child.ended:
            return  # as to a client that is gone
        if not child.from_child.has_room(len(data)):
            self._end(
                seat,
                QuotaError(
                    f"more than {MAX_WAITING_BYTES} octets wait for its parent to receive",
                    "send less, or have the parent receive_child as it goes",
                ),
            )
            return
        child.from_child.put(data, len(data))

    # --- the host -------------------------------------------------------------

    def ended(self, number: int, code: int) -> None:
        """The child is dead, and its last messages have been put."""
        child = self._by_number.pop(number, None)
        if child is None:
            return
        child.code = code
        child.ended = True
        child.from_child.close()
        child.to_child.drop()
        while child.waiters:
            seat, request = child.waiters.popleft()
            seat.waiting -= 1
            seat.answer(request, code)

    def forget(self, seat: Seat) -> None:
        """The inferlet has ended: its children read no more, and the host ends them."""
        for child in seat.children.values():
            self._part(seat, child)
        seat.children.clear()

    # --- the parent's side ----------------------------------------------------

    def _spawn(self, seat: Seat, c: abi.Spawn) -> None:
        unused(seat.children, c.child, "child")
        if len(seat.children) >= max(MIN_HANDLES, seat.limits.children):
            raise QuotaError(
                f"{len(seat.children)} handles of children are open", "end_child those done with"
            )
        left = sum(c.from_child.held.octets for c in seat.children.values() if c.ended)
        if left > MAX_WAITING_BYTES:
            raise QuotaError(
                f"{left} octets wait that children sent before they ended; the most is "
                f"{MAX_WAITING_BYTES}",
                "receive_child them, or end_child those children",
            )
        self._number += 1
        child = Child(self._number)

        def replied(error: InferletError | None) -> None:
            if error is not None and seat.children.get(c.child) is child:
                del seat.children[c.child]
                self._part(seat, child, error)

        call = services.Spawn(child.number, c.program, c.args)
        octets = sum(len(arg.encode()) for arg in c.args)
        self._host.ask(seat, c.req, call, octets, replied)
        seat.children[c.child] = child
        self._by_number[child.number] = child

    def _send(self, seat: Seat, c: abi.SendChild) -> None:
        child = _child(seat, c.child)
        if not child.to_child.open:
            raise ClosedError(f"child {c.child} takes no more messages", "stop sending")
        if not child.to_child.has_room(len(c.data)):
            raise QuotaError(
                f"more than {MAX_WAITING_BYTES} octets wait for child {c.child} to receive",
                "wait until it has received some, for an answer of it, say",
            )
        child.to_child.put(c.data, len(c.data))
        seat.answer(c.req, None)

    @staticmethod
    def _receive(seat: Seat, c: abi.ReceiveChild) -> None:
        _child(seat, c.child).from_child.receive(seat, c.req)

    @staticmethod
    def _close_child(seat: Seat, c: abi.CloseChild) -> None:
        _child(seat, c.child).to_child.close()
        seat.answer(c.req, None)

    @staticmethod
    def _wait(seat: Seat, c: abi.WaitChild) -> None:
        child = _child(seat, c.child)
        if c.req is None:
            raise ArgumentError(
                "wait_child without a request id", "give one: the exit code is its answer"
            )
        if child.code is not None:
            seat.answer(c.req, child.code)
        else:
            wait(seat)
            child.waiters.append((seat, c.req))

    def _end_child(self, seat: Seat, c: abi.EndChild) -> None:
        child = _child(seat, c.child)
        del seat.children[c.child]
        if child.code is None:
            self._host.tell(seat, services.EndChild(child.number))
        self._part(seat, child)
        seat.answer(c.req, None)

    def _part(self, seat: Seat, child: Child, error: InferletError | None = None) -> None:
        """The parent has no handle of the child any more; those that wait are told `error`."""
        self._by_number.pop(child.number, None)
        child.ended = True
        child.from_child.drop(error)
        child.to_child.close()
        error = error or ClosedError("the handle of the child was freed", "wait before end_child")
        while child.waiters:
            _, request = child.waiters.popleft()
            seat.waiting -= 1
            seat.fail(request, error)


def _child(seat: Seat, handle: int) -> Child:
    child = seat.children.get(handle)
    if child is None:
        raise HandleError(f"no child has handle {handle}", "spawn it first")
    return child
