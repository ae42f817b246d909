"""Ranges of token numbers: what a context hides, what it has let go of."""

from __future__ import annotations

from collections.abc import Iterator


class Ranges:
    """Half-open ranges, ascending, that neither overlap nor touch."""

    def __init__(self, ranges: Iterator[tuple[int, int]] | None = None) -> None:
        """`ranges` are those of another `Ranges`."""
        self._ranges = list(ranges or ())

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._ranges)

    def __len__(self) -> int:
        return len(self._ranges)

    def add(self, first: int, end: int) -> None:
        """All from `first` to before `end`."""
        if first >= end:
            return
        apart = []
        for a, b in self._ranges:
            if b < first or a > end:
                apart.append((a, b))
            else:
                first, end = min(first, a), max(end, b)
        self._ranges = sorted([*apart, (first, end)])

    def remove(self, first: int, end: int) -> None:
        """None from `first` to before `end`."""
        pieces = [p for a, b in self._ranges for p in ((a, min(b, first)), (max(a, end), b))]
        self._ranges = [(a, b) for a, b in pieces if a < b]

    def within(self, first: int, end: int) -> list[tuple[int, int]]:
        """What of them lies from `first` to before `end`."""
        cut = [(max(a, first), min(b, end)) for a, b in self._ranges]
        return [(a, b) for a, b in cut if a < b]

    def outside(self, first: int, end: int) -> list[tuple[int, int]]:
        """What from `first` to before `end` is in none of them."""
        gaps = []
        for a, b in self._ranges:
            if first < min(a, end):
                gaps.append((first, min(a, end)))
            first = max(first, b)
        if first < end:
            gaps.append((first, end))
        return gaps
