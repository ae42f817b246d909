"""Why an inferlet is dead, in words for its client."""

from __future__ import annotations

import errno
import os
import signal

from piehost.wire import launch
from piehost.wire.client import EXIT_NOT_FOUND, EXIT_REFUSED, Failed, Reason

from .allotment import Quota
from .programs import Program


def is_ours(reason: Reason | None) -> bool:
    """piehost's own failure, rather than the inferlet's or somebody's wish."""
    return reason is not None and (reason.code.endswith("_lost") or reason.code == "host_ended")


def reason_of(exited: launch.Exited, quota: Quota) -> Reason | None:
    """Why a process that nobody ended is dead; None if it returned an exit code."""
    if not os.WIFSIGNALED(exited.status):
        return None
    number = os.WTERMSIG(exited.status)
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if exited.violation is not None:
        return Reason(
            code="sandbox",
            what=f"killed by the sandbox: {exited.violation}",
            why="the inferlet made a system call that its profile forbids",
            hint="`piehost doctor` lists what the sandbox stops",
        )
    if number in (signal.SIGXCPU, signal.SIGKILL) and quota.rlimits.cpu_seconds is not None:
        return Reason(
            code="cpu_seconds",
            what="the inferlet used up its processor time",
            why=f"quota cpu_seconds is {quota.rlimits.cpu_seconds}",
            hint="--quota cpu_seconds=N with a larger N",
        )
    return Reason(
        code="signal",
        what=f"the inferlet was killed by {name}",
        why="it crashed" if number != signal.SIGKILL else "somebody killed it",
    )


def failed_spawn(request: int, program: Program, failed: launch.SpawnFailed) -> Failed:
    missing = failed.stage == "exec" and failed.errno == errno.ENOENT
    return Failed(
        request=request,
        code=EXIT_NOT_FOUND if missing else EXIT_REFUSED,
        reason=Reason(
            code=f"spawn_{failed.stage}",
            what=f"cannot start {program.path}",
            why=f"{failed.stage}: {failed.message}",
            hint=failed.hint,
        ),
    )
