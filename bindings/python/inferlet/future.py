"""Answers that have not come yet: `.result()` waits, `await` waits, nothing else does."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import asyncio

    from .connection import Connection
    from .errors import InferletError

T = TypeVar("T")


class Future(Generic[T]):
    """The answer to one command. The command was queued when the future was made.

    Waiting sends everything queued so far. Not for use from several threads.
    """

    __slots__ = ("_connection", "_convert", "_error", "_value", "_waiters", "answered")

    def __init__(self, connection: Connection, convert: Callable[[Any], T]) -> None:
        self._connection = connection
        self._convert = convert
        self._value: T
        self._error: InferletError | None = None
        self._waiters: list[asyncio.Future[None]] | None = None
        self.answered = False

    def done(self) -> bool:
        """True if the answer is here; reads what has arrived, does not wait."""
        if not self.answered:
            self._connection.poll()
        return self.answered

    def result(self) -> T:
        """Waits for the answer. Raises the `InferletError` that the command failed with."""
        if not self.answered:
            self._connection.wait(self)
        if self._error is not None:
            raise self._error
        return self._value

    def __await__(self) -> Generator[Any, None, T]:
        if not self.answered:
            waiter = self._connection.waiter()
            if self._waiters is None:
                self._waiters = []
            self._waiters.append(waiter)
            yield from waiter.__await__()
        return self.result()

    def resolve(self, value: object) -> None:
        """The connection has read the answer."""
        self._value = self._convert(value)
        self._settle()

    def fail(self, error: InferletError) -> None:
        """The connection has read an error, or its end."""
        self._error = error
        self._settle()

    def _settle(self) -> None:
        self.answered = True
        for waiter in self._waiters or ():
            if not waiter.done():  # a cancelled task's is
                waiter.set_result(None)
        self._waiters = None


def nothing(value: object) -> None:
    """Converts the answer of a command that has no value."""
