"""What queued commands take in memory beyond the plain rest, so that what waits can be bounded.

Numbers that took an octet or two in the frame take ten times as much once they are decoded. Small
commands are bounded by their number alone: what they bring along is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from inferlet import abi

MAX_QUEUED_BYTES: Final = 16 << 20  # of one inferlet, all queues together
_SMALL: Final = 1024  # octets
_ITEM: Final = 40  # octets of a number in an array
_TUPLE: Final = 200  # of a span or a pair in one


class Weights:
    """Of the commands of one inferlet that wait."""

    __slots__ = ("_large", "octets")

    def __init__(self) -> None:
        self.octets = 0
        self._large: dict[int, int] = {}  # octets by id of the command, which lives while it waits

    def add(self, command: abi.Command) -> bool:
        """Counts a command; False if that would be too much."""
        weigh = _WEIGH.get(type(command))
        if weigh is not None and (octets := weigh(command)) > _SMALL:
            if self.octets + octets > MAX_QUEUED_BYTES:
                return False
            self.octets += octets
            self._large[id(command)] = octets
        return True

    def remove(self, commands: Iterable[abi.Command]) -> None:
        """They wait no more."""
        if self.octets:
            self.octets -= sum(self._large.pop(id(command), 0) for command in commands)


def _positions(positions: int | list[int] | None) -> int:
    return _ITEM * len(positions) if isinstance(positions, list) else 0


def _embed_txt(c: abi.EmbedTxt) -> int:
    return _ITEM * len(c.tokens) + _positions(c.positions)


def _forward(c: abi.Forward) -> int:
    return _TUPLE * len(c.reads) + _positions(c.positions) + len(c.mask or b"")


def _sample(c: abi.Sample) -> int:
    return _ITEM * len(c.stop) + _TUPLE * len(c.bias)


_WEIGH: Final[dict[type[abi.Command], Callable[[Any], int]]] = {
    abi.EmbedTxt: _embed_txt,
    abi.Forward: _forward,
    abi.Sample: _sample,
    abi.WriteEmb: lambda c: _positions(c.positions),
    abi.AllocHistory: lambda c: _ITEM * len(c.prompt),
    abi.ExtendHistory: lambda c: _ITEM * len(c.tokens),
    abi.ExportKvPage: lambda c: _TUPLE * len(c.pages) + len(c.meta),
}
