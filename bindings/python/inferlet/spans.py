"""KV slots and embeds as Python sequences: slices of a handle, freed when nothing refers to them.

A span is `(handle, first, length)`: slicing one makes another of the same handle and moves no
data. When the last span of a handle is garbage collected, a dealloc command is queued; `free` does
so at once.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, SupportsIndex, TypeVar

from .abi import Command, DeallocEmb, DeallocKvPage, DeallocToken, Index
from .abi import Span as WireSpan
from .checks import wrong_type
from .errors import ArgumentError, HandleError, SpanError

if TYPE_CHECKING:
    from .command_queue import CommandQueue

S = TypeVar("S", bound="Span")


class Handle(ABC):
    """One resource of the controller, owned by the queue it was made through."""

    __slots__ = ("_number", "queue")
    kind: ClassVar[str]

    def __init__(self, queue: CommandQueue) -> None:
        self.queue = queue
        self._number = queue.runtime.new_handle()

    @property
    def number(self) -> int:
        """The handle on the wire. HandleError if it was freed or its queue destroyed."""
        if not self._number or self.queue.destroyed:
            why = "its queue was destroyed" if self.queue.destroyed else "it was freed"
            raise HandleError(f"these {self.kind} are gone: {why}", "allocate them again")
        return self._number

    def free(self) -> None:
        """Queues the dealloc command; nothing if it was freed already."""
        number, self._number = self._number, 0
        if number and not self.queue.destroyed:
            self.queue.release(number, self.dealloc_command(number))

    def forget(self) -> None:
        """It was never made, so there is nothing to free."""
        self._number = 0

    @abstractmethod
    def dealloc_command(self, number: int) -> Command:
        """The command that frees handle `number`."""

    def __del__(self) -> None:
        self.free()


class KvHandle(Handle):
    """Whole KV pages."""

    __slots__ = ("pages",)
    kind = "KV pages"

    def __init__(self, queue: CommandQueue, pages: int) -> None:
        super().__init__(queue)
        self.pages = pages

    def dealloc_command(self, number: int) -> Command:
        return DeallocKvPage(None, self.queue.number, number)


class EmbedsHandle(Handle):
    __slots__ = ()
    kind = "embeds"

    def dealloc_command(self, number: int) -> Command:
        return DeallocEmb(None, self.queue.number, number)


class TokenHandle(Handle):
    """A late-bound token."""

    __slots__ = ()
    kind = "late-bound tokens"

    def dealloc_command(self, number: int) -> Command:
        return DeallocToken(None, self.queue.number, number)


class Span:
    """`len(span)` consecutive places of a handle; slices are spans, `span[i]` has length 1."""

    __slots__ = ("_length", "first", "handle")

    def __init__(self, handle: Handle, first: int, length: int) -> None:
        self.handle = handle
        self.first = first
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self: S, at: SupportsIndex | slice) -> S:
        """IndexError if `at` is outside; ArgumentError for a slice with a step."""
        if not isinstance(at, slice):
            at = operator.index(at)
            if not -self._length <= at < self._length:
                raise IndexError(f"index {at} of a span of {self._length}")
            return type(self)(self.handle, self.first + at % self._length, 1)
        begin, end, step = at.indices(self._length)
        if step != 1:
            raise ArgumentError(f"a span has no slices of step {step}", "take each place by index")
        return type(self)(self.handle, self.first + begin, max(0, end - begin))

    def __iter__(self: S) -> Iterator[S]:
        return (self[at] for at in range(self._length))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.first}..{self.first + self._length}>"

    @property
    def wire(self) -> WireSpan:
        """The span on the wire. HandleError if the handle was freed."""
        return (self.handle.number, self.first, self._length)


class KvSpan(Span):
    """KV slots (Pie, SOSP'25: `KvPage`, here addressed by slot)."""

    __slots__ = ()


class Embeds(Span):
    """Model inputs and outputs (Pie, SOSP'25: `Emb`)."""

    __slots__ = ()

    @property
    def index(self) -> Index:
        """The one embed of it on the wire. SpanError if it is not one."""
        if len(self) != 1:
            raise SpanError(f"one embed is needed, not {len(self)}", "take one, such as out[-1]")
        return (self.handle.number, self.first)


def check_span(span: S, kind: type[S]) -> S:
    """`span`, if it is one of `kind`; else ArgumentError."""
    if not isinstance(span, kind):
        raise wrong_type("the argument", span, f"{kind.__name__}")
    return span
