"""Messages between inferlets of the same user, by topic (Pie, SOSP'25: broadcast, subscribe)."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from .abi import Broadcast, NextMessage, Subscribe, Unsubscribe
from .checks import message, name_of
from .errors import ClosedError
from .future import Answer, Future, after, nothing, same
from .runtime import Runtime, runtime
from .scope import Scoped
from .series import Series


@dataclass(frozen=True, slots=True)
class Message:
    """What was broadcast."""

    data: bytes
    sender: str  # the id of the inferlet that sent it

    @property
    def text(self) -> str:
        """`data` as UTF-8; octets that are none become U+FFFD."""
        return self.data.decode("utf-8", "replace")


def broadcast(topic: str, data: str | bytes, *, job: bool = False) -> Future[int]:
    """Sends `data` to every subscription to `topic` of the same user, this inferlet's own too, or
    with `job` to those of the same job that subscribed with `job`. Gives how many got it.
    ArgumentError if `topic` is not 1 to 256 octets, or `data` longer than 60,000."""
    connection = runtime.connection
    command = Broadcast(None, name_of("the topic", topic), message(data), bool(job))
    return connection.ask(command, Answer(connection, same))


def subscribe(topic: str, *, job: bool = False) -> Subscription:
    """The messages to `topic` from now on: of inferlets of the same user, or with `job` of those
    of the same job that broadcast with `job`. ArgumentError if `topic` is not 1 to 256 octets."""
    return Subscription(runtime, name_of("the topic", topic), bool(job))


class Subscription(Scoped, Series[Message]):
    """Messages as they come, for `for` and `async for`, or one by one with `receive`.

    Ends with its `with` block, or when nothing refers to it any more. `subscribed` is answered
    once messages are kept for it; waiting for one fails with its error, such as QuotaError. Where
    this inferlet is too slow and messages were lost, one wait fails with LaggedError.
    """

    def __init__(self, runtime: Runtime, topic: str, job: bool) -> None:
        super().__init__(runtime.connection)
        self.topic = topic
        self._number = runtime.new_handle()
        self.subscribed: Future[None] = self.connection.ask(
            Subscribe(None, self._number, topic, job), Answer(self.connection, nothing)
        )

    def __del__(self) -> None:
        if getattr(self, "_number", 0):  # not there if the constructor raised
            self.connection.release(Unsubscribe(None, self._number))

    def receive(self) -> Future[Message]:
        """The next message. ClosedError once `unsubscribe` was called."""
        return self._next()

    def unsubscribe(self) -> None:
        """Ends it: what waits for a message fails with ClosedError. Nothing if it has ended."""
        number, self._number = self._number, 0
        if number:
            with contextlib.suppress(ClosedError):
                self.connection.append(Unsubscribe(None, number))

    def _leave(self) -> None:
        self.unsubscribe()

    def _ask(self) -> Future[Message]:
        if not self._number:
            raise ClosedError(f"the subscription to {self.topic!r} was ended", "subscribe again")
        # the answer refers to this object, so that it is not collected while somebody waits
        answer = Answer(self.connection, self._message)
        return after(self.subscribed, self.connection.ask(NextMessage(None, self._number), answer))

    def _message(self, value: Any) -> Message:
        return Message(*value)
