"""Which octets of the rings the commands of an inferlet refer to, and when they count.

What lies in ring in counts when its command arrives; what lies in ring out, when an answer says
that it was written: the command's own, or for a command that wants none, that of the next command
on its queue that does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, Generic, TypeAlias, TypeVar

from inferlet import abi
from inferlet.abi import AnyCommand, Startup

Place: TypeAlias = tuple[int, int]  # offset, octets (at least 1)
T = TypeVar("T")

ALIGN: Final = 4  # of places in ring out (docs/abi.md, section 8)
_ENTRY_BYTES: Final = 8  # of a distribution: id and probability
_NUMBER_BYTES: Final = 4  # of a vector
_MOST_UNCLAIMED: Final = 256  # places of a queue that no answer has told of
_MOST_QUEUES: Final = 256  # that an inferlet may have (docs/abi.md, section 5)
# their answers do not wait for what is before them on the queue
OUT_OF_ORDER: Final = (abi.Cancel, abi.CreateQueue, abi.DestroyQueue, abi.SetQueuePriority)


class RingPlaces:
    """For an inferlet that was started with `startup`."""

    def __init__(self, startup: Startup) -> None:
        self._model = startup.models[0]
        self._limits = startup.limits

    def out(self, command: AnyCommand) -> Place | None:
        """What the backend writes for it; None if nothing, or if the ABI does not allow it."""
        place = self.asked_out(command)
        if place is None or place[0] % ALIGN or sum(place) > self._limits.ring_bytes:
            return None
        return place

    def asked_out(self, command: AnyCommand) -> Place | None:
        """Where it wants something written, allowed or not; None if nowhere."""
        match command:
            case abi.GetNextDist(k=k, offset=offset) | abi.Sample(k=k, offset=offset):
                octets = _ENTRY_BYTES * min(k, self._model.vocab_size)
            case abi.ReadEmb(emb=(_, _, length), offset=offset):
                octets = _NUMBER_BYTES * self._model.hidden_size * length
            case _:
                return None
        return (offset, octets) if octets else None

    def into(self, command: AnyCommand) -> Place | None:
        """What the backend reads for it; None likewise."""
        place = self.asked_into(command)
        return place if place is not None and sum(place) <= self._limits.ring_in_bytes else None

    def asked_into(self, command: AnyCommand) -> Place | None:
        """Where it wants something read, allowed or not; None if nowhere."""
        match command:
            case abi.Sample(mask=int(offset)):
                octets = -(-self._model.vocab_size // 8)
            case abi.WriteEmb(target=(_, _, length), offset=offset):
                octets = _NUMBER_BYTES * self._model.hidden_size * length
            case _:
                return None
        return (offset, octets) if octets else None


def union(places: Iterable[Place]) -> list[Place]:
    """The same octets, each once: ascending, and apart from each other."""
    merged: list[Place] = []
    for offset, octets in sorted(places):
        if merged and offset <= (end := sum(merged[-1])):
            first = merged[-1][0]
            merged[-1] = (first, max(end, offset + octets) - first)
        else:
            merged.append((offset, octets))
    return merged


def hull(places: list[Place]) -> list[Place]:
    """One place that covers them all."""
    first = min(offset for offset, _ in places)
    return [(first, max(map(sum, places)) - first)]


def cut(copies: list[tuple[int, bytes]], place: Place) -> bytes | None:
    """What lay at `place`, of copies (offset, octets) of a ring; None if it was not copied."""
    offset, octets = place
    for first, data in copies:
        if first <= offset and offset + octets <= first + len(data):
            return data[offset - first : offset - first + octets]
    return None


class Claims(Generic[T]):
    """Things that wait for the answer that tells of them. `compact` makes a list of those that
    no answer has told of yet shorter when a queue has too many."""

    def __init__(self, compact: Callable[[list[T]], list[T]] | None = None) -> None:
        self._compact = compact
        self._unclaimed: dict[int, list[T]] = {}  # by queue
        self._pending: dict[int, list[list[T]]] = {}  # by request

    def add(self, command: AnyCommand, item: T | None) -> None:
        """`command` was seen; `item` is what waits for its end, if anything."""
        items = [] if item is None else [item]
        queue = getattr(command, "queue", None)
        if queue is not None and not isinstance(command, OUT_OF_ORDER):
            if command.req is not None:
                items = self._unclaimed.pop(queue, []) + items
            elif items:
                self._leave(queue, items)
        if command.req is not None and items:
            self._pending.setdefault(command.req, []).append(items)

    def _leave(self, queue: int, items: list[T]) -> None:
        unclaimed = self._unclaimed.setdefault(queue, [])
        unclaimed += items
        if len(self._unclaimed) > _MOST_QUEUES:  # others are gone, or never were
            del self._unclaimed[next(iter(self._unclaimed))]
        if self._compact is not None and len(unclaimed) > _MOST_UNCLAIMED:
            unclaimed[:] = self._compact(unclaimed)

    def take(self, request: int) -> list[T]:
        """What the answer to `request` tells of."""
        waiting = self._pending.get(request)
        if waiting is None:
            return []
        items = waiting.pop(0)
        if not waiting:
            del self._pending[request]
        return items
