"""Answers that have not come yet: `.result()` waits, `await` waits, nothing else does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

if TYPE_CHECKING:
    import asyncio

    from .connection import Connection

T = TypeVar("T")


class Future(ABC, Generic[T]):
    """What a call will give. Its command was queued when the future was made.

    Waiting sends everything queued so far. Not for use from several threads.
    """

    __slots__ = ("_error", "_value", "answered")

    def __init_subclass__(cls, public: bool = False) -> None:
        """Python's own errors name the class ("'Future' object is not iterable"), and programs
        know only those that are `public`."""
        super().__init_subclass__()
        if not public:
            cls.__name__ = "Future"

    def __init__(self) -> None:
        self._value: T
        self._error: Exception | None = None
        self.answered = False

    @abstractmethod
    def done(self) -> bool:
        """True if the answer is here; reads what has arrived, does not wait."""

    @abstractmethod
    def wait(self) -> None:
        """Returns once it is answered, with a value or an error."""

    @abstractmethod
    def waiting(self) -> Generator[Any, None, None]:
        """`wait`, for `yield from` under an event loop."""

    def result(self) -> T:
        """Waits for the answer. Raises the `InferletError` that the command failed with."""
        if not self.answered:
            self.wait()
        if self._error is not None:
            raise self._error
        return self._value

    def __await__(self) -> Generator[Any, None, T]:
        if not self.answered:
            yield from self.waiting()
        return self.result()

    def __repr__(self) -> str:
        if not self.answered:
            return "<Future: wait for it with .result() or await>"
        return f"<Future: {self._value if self._error is None else self._error!r}>"

    def __bool__(self) -> bool:
        # `if store_exists(key):` would always be true
        raise TypeError("a Future is not its value: wait for it with .result() or await")

    if not TYPE_CHECKING:  # which has to see what a Future does not have

        def __getattr__(self, name: str) -> object:
            raise AttributeError(
                f"a Future has no {name!r}: wait for its value with .result() or await"
            )

    @property
    def error(self) -> Exception | None:
        """What it failed with, if it has been answered and has failed."""
        return self._error


class Answer(Future[T]):
    """The answer to one command."""

    __slots__ = ("_connection", "_convert", "_waiters")

    def __init__(self, connection: Connection, convert: Callable[[Any], T]) -> None:
        """`convert` makes the value of what the answer holds. It is kept alive until then, with
        all that it refers to."""
        super().__init__()
        self._connection = connection
        self._convert: Callable[[Any], T] | None = convert
        self._waiters: list[asyncio.Future[None]] | None = None

    def done(self) -> bool:
        if not self.answered:
            self._connection.poll()
        return self.answered

    def wait(self) -> None:
        self._connection.wait(self)

    def waiting(self) -> Generator[Any, None, None]:
        waiter = self._connection.waiter()
        if self._waiters is None:
            self._waiters = []
        self._waiters.append(waiter)
        yield from waiter.__await__()

    def resolve(self, value: object) -> None:
        """The connection has read the answer."""
        assert self._convert is not None, "a command is answered once"
        self._value = self._convert(value)
        self._settle()

    def fail(self, error: Exception) -> None:
        """The connection has read an error, or its end."""
        self._error = error
        self._settle()

    def _settle(self) -> None:
        self.answered = True
        self._convert = None
        for waiter in self._waiters or ():
            if not waiter.done():  # a cancelled task's is
                waiter.set_result(None)
        self._waiters = None


def nothing(value: object) -> None:
    """Converts the answer of a command that has no value."""


def same(value: Any) -> Any:
    """Converts an answer that is the value already."""
    return value


Steps: TypeAlias = Generator[Future[Any], Any, T]


class Composite(Future[T]):
    """Several answers that make one. `steps` yields futures, is sent the value of each or thrown
    its error, and returns the value of the whole.

    What `steps` does before its first `yield` happens at once, the rest while somebody waits.
    """

    __slots__ = ("_current", "_steps")

    def __init__(self, steps: Steps[T]) -> None:
        super().__init__()
        self._steps: Steps[T] | None = steps
        self._current: Future[Any] | None = None
        self._go_on()

    def done(self) -> bool:
        while self._current is not None and self._current.done():
            self._go_on()
        return self.answered

    def wait(self) -> None:
        while self._current is not None:
            if not self._current.answered:
                self._current.wait()
            self._go_on()

    def waiting(self) -> Generator[Any, None, None]:
        while (current := self._current) is not None:
            if not current.answered:
                yield from current.waiting()
            if current is self._current and current.answered:  # no other task has gone on already
                self._go_on()

    def _go_on(self) -> None:
        """The next step, with what became of the one before."""
        assert self._steps is not None
        last = self._current
        try:
            if last is None:
                self._current = next(self._steps)
            elif (error := last.error) is not None:
                self._current = self._steps.throw(error)
            else:
                self._current = self._steps.send(last._value)
            return
        except StopIteration as end:
            self._value = end.value
        except Exception as failure:
            self._error = failure
        self.answered = True
        self._current = self._steps = None


def after(first: Future[Any], second: Future[T]) -> Future[T]:
    """`second`, whose command needs that of `first`: fails with the error of `first` if it has
    one, which tells more than what then becomes of `second`."""
    if first.answered and first.error is None:
        return second

    def steps() -> Steps[T]:
        yield first
        value: T = yield second
        return value

    return Composite(steps())


def gather(*futures: Future[T]) -> Future[list[T]]:
    """The values of all `futures`, in their order. Their commands were queued when they were made,
    so this waits for one round trip, however many they are. Fails with the error of the first
    that failed; the others go on."""

    def steps() -> Steps[list[T]]:
        values: list[T] = []
        for future in futures:
            value: T = yield future
            values.append(value)
        return values

    return Composite(steps())
