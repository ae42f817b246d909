"""What comes one after the other: `for` and `async for` over messages, parts of a body, names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TypeVar

from .connection import Connection
from .errors import ClosedError, InferletError
from .future import Composite, Future, Steps

T = TypeVar("T")


class Series(ABC, Iterator[T], AsyncIterator[T]):
    """Each item is the answer to one command; a ClosedError is the end.

    A wait that is given up (a task that is cancelled, a `wait_for` that runs out) loses nothing:
    the next one gets that item.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._given_up: deque[Future[T]] = deque()

    @abstractmethod
    def _ask(self) -> Future[T]:
        """Queues the command for one more item. ClosedError if there will be none."""

    def _next(self) -> Future[T]:
        return self._given_up.popleft() if self._given_up else self._ask()

    def __next__(self) -> T:
        future = None
        try:
            future = self._next()
            return future.result()
        except ClosedError:
            self._raise_if_cut_off()
            raise StopIteration from None
        except BaseException as error:
            self._keep(future, error)
            raise

    async def __anext__(self) -> T:
        future = None
        try:
            future = self._next()
            return await future
        except ClosedError:
            self._raise_if_cut_off()
            raise StopAsyncIteration from None
        except BaseException as error:
            self._keep(future, error)
            raise

    def _raise_if_cut_off(self) -> None:
        """An end that piehost's own end is: not one to take for the last item."""
        if self.connection.closed is not None:
            raise self.connection.closed

    def _keep(self, future: Future[T] | None, error: BaseException) -> None:
        if future is not None and not isinstance(error, InferletError):
            self._given_up.append(future)


class Listing(Composite[list[T]], public=True):
    """All items of a list that is answered in pages: as a `Future` all at once, or one by one by
    `for` and `async for`. What changes meanwhile may be in it or not."""

    __slots__ = ("_first", "_name", "_page")

    def __init__(self, page: Callable[[str], Future[list[T]]], name: Callable[[T], str]) -> None:
        """`page(after)` asks for the items that come after the name `after`; the first is asked
        for at once. An empty page is the end."""
        self._page = page
        self._name = name
        self._first = page("")
        super().__init__(self._all())

    def _all(self) -> Steps[list[T]]:
        items: list[T] = []
        page: list[T] = yield self._first
        while page:
            items += page
            page = yield self._page(self._name(page[-1]))
        return items

    def __iter__(self) -> Iterator[T]:
        page = self._first.result()
        while page:
            ahead = self._page(self._name(page[-1]))
            yield from page
            page = ahead.result()

    async def __aiter__(self) -> AsyncIterator[T]:
        page = await self._first
        while page:
            ahead = self._page(self._name(page[-1]))
            for item in page:
                yield item
            page = await ahead
