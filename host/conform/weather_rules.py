"""Rules on how a program takes what the ABI allows the other side: each is a kind of weather."""

from __future__ import annotations

import signal
from collections.abc import Callable

from inferlet import abi
from inferlet.errors import BY_CODE

from .faults import INJECTED
from .runs import Run, Sent, Told
from .verdicts import Check, Verdict
from .weathers import stream_of

_BY_SIGNAL = 128


def ends_well(run: Run, verdict: Verdict) -> None:
    """Of the plain run; where another rule explains the end, it says nothing."""
    if run.trouble is not None:
        verdict.breaks(run, "", run.trouble)
    elif run.is_whole:
        verdict.exercised = True
        if run.code:
            verdict.breaks(run, "", _exit(run))


def as_plain(kind: str, felt: Callable[[Run], bool]) -> Check:
    """In the weather `kind` the program says and does what it did in the plain run. `felt`: the
    weather changed something in that run."""

    def check(runs: list[Run], verdict: Verdict) -> None:
        plain = next((run for run in runs if run.weather == "plain"), None)
        again = next((run for run in runs if run.weather == "again"), None)
        for run in runs:
            if run.kind != kind or plain is None or again is None:
                continue
            verdict.exercised |= felt(run)
            constant = plain.messages == again.messages
            what = run.trouble or (_difference(run, plain, constant) if run.is_whole else None)
            if what is not None:
                verdict.breaks(run, "", what)

    return check


def _difference(run: Run, plain: Run, constant: bool) -> str | None:
    """`constant`: it says the same each time in plain weather."""
    if run.code != plain.code:
        return f"{_exit(run)}; in plain weather the exit code was {plain.code}"
    if not constant or run.messages == plain.messages:
        return None
    for number, (came, expected) in enumerate(zip(run.messages, plain.messages, strict=False), 1):
        if came != expected:
            return f"message {number} is {came[:60]!r}; in plain weather it was {expected[:60]!r}"
    return f"{len(run.messages)} messages; in plain weather there were {len(plain.messages)}"


def _exit(run: Run) -> str:
    return f"exit code {run.code}" + (f" ({run.last_words})" if run.last_words else "")


def always(run: Run) -> bool:
    return True


def has_answers(run: Run) -> bool:
    return bool(run.told())


def has_other_order(run: Run) -> bool:
    """An answer came before one that was asked for earlier, elsewhere."""
    latest = (0, ("", 0))
    for told in run.told():
        if told.sent is not None:
            number, stream = told.sent.number, stream_of(told.sent.command)
            if number < latest[0] and stream != latest[1]:
                return True
            latest = max(latest, (number, stream))
    return False


def awaited(run: Run, frame: int) -> list[Sent]:
    """What was asked for up to that frame and not answered up to then. `send` is left out: who
    ends need not wait for its answer."""
    open_: dict[int, Sent] = {}  # by number
    for step in run.steps:
        if isinstance(step, Told) and step.sent is not None:
            open_.pop(step.sent.number, None)
        elif isinstance(step, Sent):
            if step.frame > frame:
                break
            if step.command.req is not None and not isinstance(step.command, abi.Send):
                open_[step.number] = step
    return list(open_.values())


def survives(unknown: bool) -> Callable[[Run, Verdict], None]:
    """Errors are taken as answers: those of the ABI, or (`unknown`) with a code of none."""

    def judge(run: Run, verdict: Verdict) -> None:
        if (run.code_injected not in BY_CODE) != unknown:
            return
        verdict.exercised |= any(told.error and told.error[1] == INJECTED for told in run.told())
        if run.trouble is not None:
            code = run.code_injected
            name = BY_CODE[code].name if code in BY_CODE else f"an error with code {code}"
            verdict.breaks(run, "", f"{run.trouble}; it had been told {name}")

    return judge


def survives_limits(run: Run, verdict: Verdict) -> None:
    verdict.exercised |= run.frames > 0
    if run.trouble is not None:
        verdict.breaks(run, "", run.trouble)


def ends_with_connection(run: Run, verdict: Verdict) -> None:
    frame = int(run.weather.rpartition(":")[2])
    if run.frames < frame or not awaited(run, frame):
        return  # it may have had all it wanted
    verdict.exercised = True
    where = f"frame {frame}"
    if run.code == _BY_SIGNAL + signal.SIGPIPE:
        return
    if run.trouble is not None:
        verdict.breaks(run, where, f"{run.trouble}, and the connection was closed")
    elif run.is_whole and run.code == 0:
        verdict.breaks(run, where, "the connection was closed, and it ended with exit code 0")
