"""Rules on what goes over the connection: frames, commands, request ids, answers to errors."""

from __future__ import annotations

from inferlet import abi
from inferlet.errors import ClosedError

from .faults import queue_in_order
from .runs import Bad, Run, Sent, Told
from .verdicts import Judge, Verdict

_IN_VAIN = 2  # errors told for commands sent after the first was told, and no synchronize
_ASKED_ON = 3  # receives after `closed` that show a loop without end


def no_fault(rule: str) -> Judge:
    """Nothing that `bad_frames.find` blames on that rule."""

    def judge(run: Run, verdict: Verdict) -> None:
        verdict.exercised |= run.frames > 0
        for step in run.steps:
            if isinstance(step, Bad) and step.fault.rule == rule:
                verdict.breaks(run, f"frame {step.frame}", step.fault.why)

    return judge


def whole_frames(run: Run, verdict: Verdict) -> None:
    verdict.exercised |= run.frames > 0
    if run.cut_off and run.kind != "cut":
        what = f"the program ended {run.cut_off} octets into a frame"
        verdict.breaks(run, f"frame {run.frames + 1}", what)


def unique_requests(run: Run, verdict: Verdict) -> None:
    """On one queue it may be: answers come in order there."""
    outstanding: dict[int, list[Sent]] = {}
    for step in run.steps:
        if isinstance(step, Told) and step.sent is not None:
            outstanding[step.request].remove(step.sent)
        elif isinstance(step, Sent) and (request := step.command.req) is not None:
            verdict.exercised = True
            queue = queue_in_order(step.command)
            for other in outstanding.setdefault(request, []):
                if queue is None or queue_in_order(other.command) != queue:
                    what = f"request id {request} is that of command {other.number}, which is not "
                    verdict.breaks(run, step.where, what + "answered yet")
                    return
            outstanding[request].append(step)


def reads_answers(run: Run, verdict: Verdict) -> None:
    verdict.exercised |= bool(run.told())
    if run.ended_for == "over_quota" and run.reason is not None:
        verdict.breaks(run, "", f"the controller ended it: {run.reason.what}")


def synchronizes(run: Run, verdict: Verdict) -> None:
    """It may learn of an error late, and try once more; to go on and on is to ignore errors."""
    known: dict[int, int] = {}  # by number of a command: errors of its queue told before it
    first: dict[int, Sent] = {}  # by queue: the command whose error was told first
    errors: dict[int, int] = {}  # by queue: rounds of errors told since it last synchronized
    for step in run.steps:
        if isinstance(step, Sent):
            command = step.command
            if isinstance(command, abi.Synchronize | abi.DestroyQueue):
                errors.pop(command.queue, None)
            elif (queue := queue_in_order(command)) is not None:
                known[step.number] = errors.get(queue, 0)
        elif isinstance(step, Told) and step.error is not None and (sent := step.sent) is not None:
            if sent.number not in known:
                continue
            queue = queue_in_order(sent.command)
            assert queue is not None
            verdict.exercised = True
            if queue not in errors:
                errors[queue], first[queue] = 1, sent
            elif known[sent.number] == errors[queue]:
                errors[queue] += 1
            if errors[queue] > _IN_VAIN:
                verdict.breaks(
                    run,
                    sent.where,
                    f"queue {queue} failed at command {first[queue].number}, and the program "
                    "went on with it, was told the error again, and never synchronized",
                )
                return


def ends_on_closed(run: Run, verdict: Verdict) -> None:
    closed: set[int] = set()  # numbers of the receives that were sent after `closed` was told
    told = False
    after = 0
    for step in run.steps:
        if isinstance(step, Sent) and isinstance(step.command, abi.Receive) and told:
            closed.add(step.number)
        elif isinstance(step, Told) and _is_closed(step):
            told = verdict.exercised = True
            after += step.sent is not None and step.sent.number in closed
            if after == _ASKED_ON:
                what = f"it went on to receive {after} times after it was told `closed`"
                verdict.breaks(run, "", what)


def _is_closed(told: Told) -> bool:
    """There will be nothing more to receive."""
    received = told.sent is not None and isinstance(told.sent.command, abi.Receive)
    return received and told.error is not None and told.error[0] == ClosedError.code


def makes_allowed_calls(run: Run, verdict: Verdict) -> None:
    verdict.exercised = True
    if run.ended_for == "sandbox" and run.reason is not None:
        verdict.breaks(run, "", run.reason.what)
