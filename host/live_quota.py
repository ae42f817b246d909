"""Changes what a running inferlet may use: all that is asked, or nothing.

Who enforces what: the controller the counts and rates of calls, the kernel the process limits
(prlimit(2)) and the control group, the store and the egress broker theirs (told with the next
call), the host itself children, output and time.
"""

from __future__ import annotations

import contextlib
import re
import resource
import select
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import psutil

from .errors import HostError, Refused
from .quotas import QUOTAS, exceeds, parse_value
from .seats import Seat

_WHERE: Final = "quota set"
_OPTIONS: Final = {
    "address_space": "as",
    "fds": "nofile",
    "file_size": "fsize",
    "cpu_seconds": "cpu",
    "threads": "nproc",
}
_PRLIMIT_SECONDS: Final = 5.0
_RLIMITS: Final = {
    "address_space": resource.RLIMIT_AS,
    "fds": resource.RLIMIT_NOFILE,
    "file_size": resource.RLIMIT_FSIZE,
    "cpu_seconds": resource.RLIMIT_CPU,
    "threads": resource.RLIMIT_NPROC,
}
_GROUP: Final = ("memory", "cpu", "threads")  # what its control group limits


def change(seat: Seat, asked: Mapping[str, str]) -> dict[str, int | None]:
    """Changes the quotas of `seat` to `asked`, as the command line spells them, and returns them as
    numbers. The controller is to be told of `seat.quota` by the caller.

    Refused for a quota that there is not, a bad value, or one that stays as it is while the
    inferlet runs; HostError if it does not run, or the system refuses. Nothing is changed then.
    """
    changes = {key: parse_value(key, value, _WHERE) for key, value in asked.items()}
    if not changes:
        raise Refused("no quota is given", hint="key=value", code="bad_quota")
    for key in changes:
        _check_changeable(seat, key)
    if seat.state != "running" or _is_dead(seat):
        raise HostError(
            f"{seat.id} does not run: it is {seat.state}",
            "only a running inferlet's quotas can be changed",
            "`piehost ps` shows what runs",
            "not_running",
        )
    limits = {key: number for key, number in changes.items() if key in _RLIMITS}
    if "threads" in limits and not _counts_its_threads(seat):
        del limits["threads"]
    for key in changes:
        if key in _GROUP and not seat.in_group and key not in limits:
            raise HostError(
                f"quota {key} of {seat.id} cannot be kept",
                "it has no control group: this machine has none to give",
                "`piehost doctor` says why",
                "cgroup",
            )
    if limits:
        try:
            _set_limits(seat.pid, seat.quota.values, limits)
        except ProcessLookupError as error:
            raise HostError(f"{seat.id} has just ended", code="not_running") from error
        except (OSError, ValueError) as error:
            raise HostError(
                f"the limits {', '.join(limits)} of {seat.id} cannot be changed so",
                f"the system refuses it ({error}): a process without CAP_SYS_RESOURCE may only "
                "lower the limits of processes of its own user",
                "run the server with that capability, or launch it again with --quota",
                "not_permitted",
            ) from error
    seat.change_quota(changes)
    return changes


def _check_changeable(seat: Seat, key: str) -> None:
    fixed = QUOTAS[key].fixed
    if fixed:
        raise Refused(
            f"quota {key} stays as it is while {seat.id} runs",
            fixed,
            f"launch it again with --quota {key}=...",
            "fixed_quota",
        )
    parent = seat.owner.parent
    if key == "wall_seconds" and parent is not None:
        while parent.owner.parent is not None:
            parent = parent.owner.parent
        raise Refused(
            f"{seat.id} has no time of its own",
            "what an inferlet spawns has the deadline of the launch",
            f"piehost quota set {parent.id} wall_seconds=...",
            "fixed_quota",
        )


def _counts_its_threads(seat: Seat) -> bool:
    """Whether the kernel limits its threads apart from those of others: it has its own user id."""
    try:
        limits = Path(f"/proc/{seat.pid}/limits").read_text()
    except OSError:  # it has just ended
        return False
    soft = re.search(r"^Max processes +(\d+|unlimited)", limits, re.MULTILINE)
    return soft is not None and soft[1] == str(seat.quota.threads)


def _is_dead(seat: Seat) -> bool:
    """Its pid may be another's soon."""
    poll = select.poll()
    poll.register(seat.pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _set_limits(
    pid: int, before: Mapping[str, int | None], limits: Mapping[str, int | None]
) -> None:
    """Soft and hard limits of the process, which are `before`. What is raised comes first: the
    kernel may refuse it, and lowering it again not. ProcessLookupError or, if the kernel does not
    take it, PermissionError or ValueError."""
    raised = {key for key, number in limits.items() if exceeds(number, before[key])}
    lowered = {key: number for key, number in limits.items() if exceeds(before[key], number)}
    with contextlib.ExitStack() as undo:
        for key in raised:
            _set_limit(pid, key, limits[key])
            undo.callback(_restore, pid, key, before[key])
        try:
            for key, number in lowered.items():
                _set_limit(pid, key, number)
        except PermissionError:  # it has a user id of its own
            _lower_as_its_user(pid, lowered)
        undo.pop_all()


def _set_limit(pid: int, key: str, number: int | None) -> None:
    value = resource.RLIM_INFINITY if number is None else number
    resource.prlimit(pid, _RLIMITS[key], (value, value))


def _restore(pid: int, key: str, number: int | None) -> None:
    with contextlib.suppress(OSError):  # it is gone
        _set_limit(pid, key, number)


def _lower_as_its_user(pid: int, limits: Mapping[str, int | None]) -> None:
    """By a process that has the same user id: to others the kernel gives that right only with
    CAP_SYS_RESOURCE, which containers rarely have. PermissionError, ProcessLookupError."""
    options = [f"--{_OPTIONS[key]}={number}:{number}" for key, number in limits.items()]
    try:
        process = psutil.Process(pid)
        user, group = process.uids().real, process.gids().real
        done = subprocess.run(
            ["prlimit", f"--pid={pid}", *options],
            user=user,
            group=group,
            extra_groups=[],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PRLIMIT_SECONDS,
        )
    except psutil.NoSuchProcess as error:
        raise ProcessLookupError from error
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise PermissionError(f"prlimit(1) cannot be run: {error}") from error
    if done.returncode:
        raise PermissionError(done.stderr.decode(errors="replace").strip())
