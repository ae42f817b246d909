"""Rules on handles and late-bound tokens. The controller's `bad_handle` is the proof (`unwritten`
for tokens); which command is to blame, a table of what the program made so far tells.
"""

from __future__ import annotations

from typing import NamedTuple

from inferlet import abi
from inferlet.abi import AnyCommand
from inferlet.errors import HandleError, UnwrittenError

from ..handles import Named, freed_by, made_by, used_by
from .faults import queue_in_order
from .runs import Run, Sent, Told
from .verdicts import Judge, Verdict

RANGE, FRESH, LIVE, SAMPLED = "handle-range", "handle-fresh", "handle-live", "token-sampled"


class _Suspect(NamedTuple):
    sent: Sent
    rule: str
    why: str


class _Table:
    """What is there if every command works, in the order they were sent."""

    def __init__(self) -> None:
        # made by which command, through which queue
        self._live: dict[Named, tuple[int, int | None]] = {}
        self._freed: dict[Named, int] = {}

    def take(self, sent: Sent) -> _Suspect | None:
        command = sent.command
        suspect = None
        for named in used_by(command):
            if named not in self._live and suspect is None:
                suspect = _Suspect(sent, _rule_of(named, command), self._why_missing(named))
        made = made_by(command)
        if made is not None:
            if made in self._live and made.kind != "token":  # sampling again rebinds it
                why = f"{made.kind} {made.handle} is in use: command {self._live[made][0]} made it"
                suspect = suspect or _Suspect(sent, FRESH, why)
            self._live[made] = sent.number, getattr(command, "queue", None)
        freed = freed_by(command)
        if freed is not None:
            self._free(freed, sent.number)
        if isinstance(command, abi.DestroyQueue):
            for named in [n for n, (_, queue) in self._live.items() if queue == command.queue]:
                self._free(named, sent.number)
        return suspect

    def failed(self, command: AnyCommand) -> None:
        """What it would have made is not there."""
        made = made_by(command)
        if made is not None:
            self._live.pop(made, None)

    def _free(self, named: Named, by: int) -> None:
        if self._live.pop(named, None) is not None:
            self._freed[named] = by

    def _why_missing(self, named: Named) -> str:
        by = self._freed.get(named)
        fate = f"freed by command {by}" if by is not None else "never made"
        return f"{named.kind} {named.handle} was {fate}"


def _rule_of(named: Named, command: AnyCommand) -> str:
    late = named.kind == "token" and not isinstance(command, abi.DeallocToken)
    return SAMPLED if late else LIVE


def handles(rule: str) -> Judge:
    """Nothing to blame on that one of the rules above."""

    def judge(run: Run, verdict: Verdict) -> None:
        for sent in run.sent():
            if rule == FRESH:
                verdict.exercised |= made_by(sent.command) is not None
            else:
                verdict.exercised |= any(
                    _rule_of(n, sent.command) == rule for n in used_by(sent.command)
                )
        for suspect in _blamed(run):
            if suspect.rule == rule:
                verdict.breaks(run, suspect.sent.where, suspect.why)

    return judge


def _blamed(run: Run) -> list[_Suspect]:
    """Those of whom it is sure."""
    table = _Table()
    suspects: list[_Suspect] = []  # not blamed yet
    blamed: list[_Suspect] = []
    stopped: set[int] = set()  # queues whose error somebody is blamed for already
    sure = True  # nothing else went wrong, so whatever is suspect failed
    for step in run.steps:
        if isinstance(step, Sent):
            if (suspect := table.take(step)) is not None:
                suspects.append(suspect)
            sure = sure and not isinstance(step.command, abi.Cancel)
        elif isinstance(step, Told) and step.sent is not None:
            queue = queue_in_order(step.sent.command)
            known = queue in stopped
            if isinstance(step.sent.command, abi.Synchronize):
                stopped.discard(step.sent.command.queue)
            if step.error is None:
                continue
            sure = False
            table.failed(step.sent.command)
            culprit = None if known else _culprit(suspects, step.sent, queue, step.error)
            if culprit is not None:
                blamed.append(culprit)
                suspects = [s for s in suspects if s is not culprit]
                if queue is not None and not isinstance(step.sent.command, abi.Synchronize):
                    stopped.add(queue)
    return blamed + (suspects if sure else [])


def _culprit(
    suspects: list[_Suspect], told: Sent, queue: int | None, error: tuple[int, str, str]
) -> _Suspect | None:
    """The first suspect up to `told` that the error can be about; None if no rule here is."""
    code, message, _ = error
    for suspect in suspects:
        same = queue is not None and queue_in_order(suspect.sent.command) == queue
        if suspect.sent is told or (same and suspect.sent.number <= told.number):
            expected = UnwrittenError if suspect.rule == SAMPLED else HandleError
            return suspect if code in (HandleError.code, expected.code) else None
    return _Suspect(told, LIVE, message) if code == HandleError.code else None
