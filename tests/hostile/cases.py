"""What an attack is, as data: who makes it, with which words, and what must come of it.

What came of it is said in a few words. `ended: CODE` is the reason of its end, as the client sees
it; `says: LINE` what it printed before it ended by itself. The escapes' letters are those of
`calls.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from piehost.host.client import Result

from . import calls

PROFILES: Final = ("native", "dynamic", "python", "node", "perl")


class Live(NamedTuple):
    """What is known only as the attack is made."""

    sibling: int  # pid
    launcher: int  # pid of the attacker's


class Case(NamedTuple):
    """One attack, a row of the table for each profile."""

    name: str
    promise: str  # P1 to P10
    expected: str
    program: str  # one of tests/attackers, by name
    words: tuple[object, ...] = ()
    variants: tuple[tuple[object, ...], ...] = ()  # instead of `words`: each is tried
    quotas: Mapping[str, str] = {}
    crowd: int = 1  # so many at once
    # it does not end by itself: what it uses is looked at, and that others are served meanwhile
    stays: str = ""  # "", or "held" / "stopped": how it is ended
    judge: Callable[[Result], str] | None = None
    cgroup: str = ""  # expected where no control group can be had, if that is something else
    hidden: str = ""  # expected where a mount namespace hides what is not granted, if different
    not_on: Mapping[str, str] = {}  # profile -> why there is no such attack
    on_profile: Mapping[str, str] = {}  # profile -> what is expected there instead
    quick: bool = False  # is in the suite


def judged(case: Case, result: Result) -> str:
    if case.judge is not None and result.reason is None:
        return case.judge(result)
    if result.reason is not None and result.reason.code == "sandbox":
        return f"ended: sandbox ({result.reason.what.removeprefix('killed by the sandbox: ')})"
    printed = " ".join(result.stdout.decode(errors="replace").split())
    if result.reason is not None:
        said = f", {printed}" if printed else ""
        return f"ended: {result.reason.code}{said[:80]}"
    if result.code == 0:
        return f"says: {printed[:80]}"
    return f"exit code {result.code}, {printed[:80]}"


def call_case(promise: str, attack: calls.Attack, quick: bool) -> Case:
    def judge(result: Result) -> str:
        return calls.outcome_of(result.stdout.decode(errors="replace"))[:80]

    killed = f"ended: sandbox ({attack.call})"
    refused = attack.expected_under("native", hides=False)
    return Case(
        attack.name,
        promise,
        killed if refused == calls.K else refused,
        "call",
        (attack.number, *attack.arguments),
        judge=judge,
        # libuv tries it unasked, so there it must not kill
        on_profile={"node": calls.N} if attack.name == "io_uring_setup" else {},
        hidden=calls.A if attack.expected == calls.A else "",
        quick=quick,
    )


def answers(result: Result) -> list[list[Any]]:
    """What the attacker was answered, by request id."""
    frames = [
        msgspec.msgpack.decode(bytes.fromhex(line)) for line in result.stdout.decode().split()
    ]
    return sorted((answer for frame in frames for answer in frame), key=lambda answer: answer[1])


def codes(result: Result) -> str:
    """The code of each error it was answered, 0 for what worked."""
    return "answered: " + " ".join(str(a[2] if a[0] else 0) for a in answers(result))


def one_error(result: Result) -> str:
    """How many answers there are, from request 10 on, and whether all are the same error, but for
    the handle's number."""
    asked = [a for a in answers(result) if a[1] >= 10]
    errors = {(a[2], re.sub(r"\d+", "N", a[3]), a[4]) if a[0] else (0, "", "") for a in asked}
    if len(errors) != 1:
        return f"{len(errors)} different answers: {sorted(errors)}"
    return f"answered: {len(asked)} times the same {errors.pop()[0]}"


def stopped(word: str, least: int, most: int) -> Callable[[Result], str]:
    """It took one after the other until it was refused, with `word`, and counted them."""

    def judge(result: Result) -> str:
        said, _, count = result.stdout.decode().strip().rpartition(" at ")
        right = said == word and result.code == 0 and least <= int(count) <= most
        return f"{word}, {least} to {most}" if right else f"said {result.stdout!r}"

    return judge


def rounds(count: int) -> Callable[[Result], str]:
    """It had two answers in each, and the accelerator's work for at least one."""

    def judge(result: Result) -> str:
        if result.code != 0 or result.stdout != f"{2 * count} answers\n".encode():
            return f"exit code {result.code}, {result.stdout!r}"
        steps = result.stats.steps
        return f"{2 * count} answers, {count if steps >= count else steps} steps or more"

    return judge


def output_of(limit: int) -> Callable[[Result], str]:
    """It wrote x without end to stdout and stderr."""

    def judge(result: Result) -> str:
        for name, got in (("stdout", result.stdout), ("stderr", result.stderr)):
            notice = f"\n[piehost: {name} is cut off after {limit} octets]\n".encode()
            if got != b"x" * limit + notice:
                return f"{len(got)} octets of {name} came, which end with {got[-60:]!r}"
        return f"cut at {limit}, exit code {result.code}"

    return judge
