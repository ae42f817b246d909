"""What a rule is, and what is found out about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, TypeAlias

from msgspec import Struct

from .runs import Run

# weathers in which a program may notice nothing
FAIR: Final = ("plain", "again", "octets", "late", "reordered", "wide", "keys")


class Evidence(Struct):
    """One time that a rule was broken."""

    weather: str
    where: str  # frame and command; empty if it is about the run as a whole
    what: str


class Verdict(Struct):
    """Of one rule. It is broken if there is evidence, else kept if it was exercised."""

    exercised: bool = False
    broken: list[Evidence] = []

    @property
    def state(self) -> str:
        if self.broken:
            return "broken"
        return "kept" if self.exercised else "not exercised"

    def breaks(self, run: Run, where: str, what: str) -> None:
        self.exercised = True
        self.broken.append(Evidence(run.weather, where, what))


Check: TypeAlias = Callable[[list[Run], Verdict], None]
Judge: TypeAlias = Callable[[Run, Verdict], None]


class Rule(Struct, frozen=True):
    id: str
    section: str  # of docs/abi.md
    text: str
    check: Check


def each(judge: Judge, kinds: Iterable[str] | None = None) -> Check:
    """Every run by itself; only those in weathers of these kinds, if given."""
    chosen = None if kinds is None else frozenset(kinds)

    def check(runs: list[Run], verdict: Verdict) -> None:
        for run in runs:
            if chosen is None or run.kind in chosen:
                judge(run, verdict)

    return check
