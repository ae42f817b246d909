"""Why an inferlet is dead, in words for its client."""

from __future__ import annotations

import errno
import os
import signal
from typing import Final

from piehost.wire import launch
from piehost.wire.client import EXIT_NOT_FOUND, EXIT_REFUSED, Failed, Reason

from .allotment import Quota
from .cgroups import Fault, GroupUsage
from .programs import Program
from .quotas import as_text


def is_ours(reason: Reason | None) -> bool:
    """piehost's own failure, rather than the inferlet's or somebody's wish."""
    return reason is not None and (reason.code.endswith("_lost") or reason.code == "host_ended")


def reason_of(
    exited: launch.Exited, quota: Quota, group: GroupUsage | None = None
) -> Reason | None:
    """Why a process that nobody ended is dead; None if it returned an exit code. `group`: what its
    control group says of it, if it had one."""
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
    if number == signal.SIGKILL and group is not None and group.oom_kills:
        return _out_of_memory(quota) if group.reached else _OUT_OF_ALL_MEMORY
    cpu_seconds = quota.rlimits.cpu_seconds
    used = exited.user_seconds + exited.system_seconds
    if number in (signal.SIGXCPU, signal.SIGKILL) and cpu_seconds and used > cpu_seconds - 0.5:
        return Reason(
            code="cpu_seconds",
            what="the inferlet used up its processor time",
            why=f"quota cpu_seconds is {cpu_seconds}, and it used {used:.1f}",
            hint="--quota cpu_seconds=N with a larger N",
        )
    if number == signal.SIGXFSZ:
        return Reason(
            code="file_size",
            what="the inferlet wrote beyond the largest file it may",
            why=f"quota file_size is {quota.rlimits.file_size}",
            hint="--quota file_size=N with a larger N",
        )
    return Reason(
        code="signal",
        what=f"the inferlet was killed by {name}",
        why="it crashed" if number != signal.SIGKILL else "somebody killed it",
    )


def reason_of_fault(fault: Fault, quota: Quota) -> Reason:
    """Why a process is ended that could not be put into its control group, or held too much when
    it was."""
    match fault.code:
        case "memory":
            return _out_of_memory(quota)
        case "threads":
            return Reason(
                code="threads",
                what="the inferlet started more threads than it may",
                why=f"quota threads is {quota.threads}",
                hint="--quota threads=N with a larger N",
            )
    return Reason(
        code="cgroup_lost",
        what="the inferlet could not be put into its control group",
        why=fault.why,
        hint="see who else changes the control groups of this machine, and `piehost doctor`",
    )


def reason_of_no_group(error: OSError) -> Reason:
    """It is alive, and what would limit it cannot be reached."""
    return Reason(
        code="descriptors",
        what="the inferlet cannot be put into its control group",
        why=error.strerror or str(error),
        hint="fewer inferlets at once, or a higher `ulimit -n` for the server",
    )


def _out_of_memory(quota: Quota) -> Reason:
    return Reason(
        code="memory",
        what="the inferlet used up its memory",
        why=f"quota memory is {as_text('memory', quota.memory)}",
        hint="--quota memory=SIZE with a larger SIZE",
    )


_OUT_OF_ALL_MEMORY: Final = Reason(
    code="memory",
    what="the memory of all inferlets together was used up",
    why="the kernel ended this one, which held much of it",
    hint="launch fewer at once, or keep each smaller with --quota memory=SIZE",
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
