"""What an inferlet's handles stand for: KV blocks, embeds, late-bound tokens, histories, queues.

Small typed records; behaviour beyond their own invariants lives with the commands. Knows nothing of
sockets.
"""

from __future__ import annotations

from array import array
from collections import deque
from typing import TYPE_CHECKING, Final

from inferlet.abi import Command
from inferlet.errors import InferletError, SpanError

if TYPE_CHECKING:
    from .flight import Flight
    from .forward import Pass
    from .seat import Seat


class Late:
    """A sampled token: known to the accelerator first, to us when its step is answered.

    `dead` means that what is embedded from it is dropped: it hit its stop list, or it was itself
    sampled from something dropped. `parents` are the tokens that may still turn out dead and take
    this one with them.
    """

    __slots__ = ("dead", "index", "lost", "may_die", "parents", "queue", "step", "value")

    def __init__(
        self, queue: Queue, step: int, index: int, parents: tuple[Late, ...], stops: bool
    ) -> None:
        self.queue = queue
        self.step = step
        self.index = index  # among the samples of its step
        self.parents = parents
        self.value: int | None = None
        self.dead = False
        self.lost = False  # its step or its mask failed: dead, and as if never sampled
        self.may_die = stops or bool(parents)

    @property
    def undecided(self) -> bool:
        """It may yet turn out dead."""
        return self.may_die and self.value is None and not self.doomed

    @property
    def doomed(self) -> bool:
        """Dead, or sure to be: a token it was made from is. Parents are forgotten once they are
        decided, so this looks no further back than the steps in flight."""
        return self.dead or any(parent.doomed for parent in self.parents)

    @classmethod
    def dropped(cls, queue: Queue) -> Late:
        late = cls(queue, -1, -1, (), False)
        late.dead = True
        return late


def undecided(lates: tuple[Late, ...]) -> tuple[Late, ...]:
    """Those that may yet turn out dead."""
    if not lates:
        return lates
    return tuple(late for late in lates if late.undecided)


def any_dead(lates: tuple[Late, ...]) -> bool:
    return bool(lates) and any(late.doomed for late in lates)


def follows(lates: tuple[Late, ...], needed: tuple[Late, ...]) -> bool:
    """True if each of `needed`, turning out dead, would also make one of `lates` dead.

    Tokens further back than the steps in flight are decided, so the walk is short.
    """
    return all(any(_descends(late, need) for late in lates) for need in needed)


def _descends(late: Late, ancestor: Late) -> bool:
    if late is ancestor:
        return True
    return any(_descends(p, ancestor) for p in late.parents if p.undecided)


class Hidden:
    """A vector in the backend's pool: what a forward left for one input, or write_emb's."""

    __slots__ = ("lates", "row", "step")

    def __init__(self, row: int, step: int, lates: tuple[Late, ...]) -> None:
        self.row = row
        self.step = step  # whose forward fills the row: an input of later ones; 0 for write_emb's
        self.lates = lates  # tokens that, turning out dead, make this one dropped


class Stopped:
    """An embed whose making was dropped because its token was stopped."""


STOPPED: Final = Stopped()
Entry = int | Late | Hidden | Stopped | None  # None: unwritten; int: a token id


class EmbBlock:
    """An emb handle: entries and their positions, those of dropped ones too."""

    __slots__ = ("entries", "positions", "queue")

    def __init__(self, queue: Queue, count: int) -> None:
        self.queue = queue
        self.entries: list[Entry] = [None] * count
        self.positions: list[int] = [0] * count


class History:
    """A history handle: the tokens that penalties look at.

    `tokens` are known; from the first one not known yet on they are in `tail`, until `settle`
    moves them over. Of each, the prompt's come first.
    """

    __slots__ = ("prompt", "queue", "tail", "tail_prompt", "tokens")

    def __init__(self, queue: Queue, prompt: list[int | Late]) -> None:
        self.queue = queue
        self.tokens: array[int] = array("i")
        self.tail: deque[int | Late] = deque()
        self.prompt = self.tail_prompt = 0  # how many of the tokens, and of the tail, are prompt
        self.extend(prompt)
        self.prompt, self.tail_prompt = len(self.tokens), len(self.tail)

    def __len__(self) -> int:
        """What it counts as: a token of the tail may yet be left out."""
        return len(self.tokens) + len(self.tail)

    def extend(self, tokens: list[int | Late]) -> None:
        if self.tail:
            self.tail.extend(tokens)
            return
        late = next((i for i, token in enumerate(tokens) if type(token) is not int), len(tokens))
        self.tokens.extend(tokens[:late])  # type: ignore[arg-type]
        self.tail.extend(tokens[late:])

    def settle(self) -> None:
        """Takes over what has become known; stopped and dropped tokens are left out."""
        while self.tail:
            token = self.tail[0]
            if isinstance(token, Late):
                if token.doomed:
                    self.queue.seat.history_held -= 1
                    self._next()
                    continue
                if token.value is None:
                    return
                token = token.value
            self.prompt += self._next()
            self.tokens.append(token)

    def _next(self) -> bool:
        """Takes the tail's first token off it. True if it belongs to the prompt."""
        self.tail.popleft()
        prompt = self.tail_prompt > 0
        self.tail_prompt -= prompt
        return prompt


class KvBlock:
    """A kv handle: pages side by side, and what is known of their slots without asking the device.

    No slot from `filled` on was ever written. While `regular`, slot i < filled holds position
    base + i and is visible: the batcher may then address the block by its page table with no mask.
    """

    __slots__ = ("alive", "base", "conditional", "filled", "page_size", "pages", "queue", "regular")

    def __init__(self, queue: Queue, pages: array[int], page_size: int) -> None:
        self.queue = queue
        self.pages = pages  # i32 page ids, -1 where freed, below that `in_host_memory`
        self.page_size = page_size
        self.alive = True
        self.regular = True
        self.base = 0
        self.filled = 0
        # tokens of the latest write in flight: if one is dead that write is undone when it lands
        self.conditional: tuple[Late, ...] = ()

    def check(self, first: int, length: int, what: str) -> None:
        """SpanError unless slots first .. first + length - 1 exist."""
        size = self.page_size
        if first + length > len(self.pages) * size:
            raise SpanError(
                f"{what} reaches slot {first + length - 1}, but the handle has "
                f"{len(self.pages) * size} slots",
                "allocate more pages, or shorten the span",
            )
        if length and -1 in self.pages[first // size : (first + length - 1) // size + 1]:
            raise SpanError(f"{what} reaches a page that was freed", "do not use freed pages")

    def note_write(self, first: int, length: int, position: int | None) -> None:
        """Slots were written; `position` is the first of consecutive ones, None if they are not."""
        if self.regular:
            if self.filled == 0 and first == 0 and position is not None:
                self.base = position
            elif position is None or first > self.filled or position != self.base + first:
                self.regular = False
        self.filled = max(self.filled, first + length)

    def note_undo(self, first: int) -> None:
        """The slots from `first` on, never written before, are unwritten again."""
        self.filled = min(self.filled, first)

    def slots(self, first: int, length: int) -> array[int]:
        """Physical slots of a span: i32[length]."""
        size, out, at, end = self.page_size, array("i"), first, first + length
        while at < end:
            start = self.pages[at // size] * size
            stop = min(end, (at // size + 1) * size)
            out.extend(range(start + at % size, start + at % size + stop - at))
            at = stop
        return out


def in_host_memory(number: int) -> int:
    """How a KvBlock writes a place of host memory that its page has gone to; and what place it
    is."""
    return -2 - number


class Queue:
    """Commands in order, the error that stopped them, and what of them is in flight."""

    __slots__ = (
        "commands",
        "current",
        "error",
        "flight",
        "pipelined",
        "priority",
        "risky",
        "seat",
        "since",
    )

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        self.commands: deque[Command] = deque()
        self.current: Pass | None = None  # the head, if it is a forward under way
        self.error: InferletError | None = None
        self.flight: Flight | None = None  # the latest unanswered step with a part of this queue
        self.risky: Flight | None = None  # the latest with a part that may fail by itself
        self.priority = 0
        self.since = 0  # arrival number of the head: oldest goes first
        self.pipelined = False  # its next command can run before the last step is answered
