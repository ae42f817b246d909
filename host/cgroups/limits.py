"""What a group may hold, and which files of which controller say so.

Sources: the kernel's Documentation/admin-guide/cgroup-v1/{memory,pids}.rst, scheduler/sched-bwc.rst
and cgroup-v2.rst.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, NamedTuple, TypeAlias

from msgspec import Struct

Controller: TypeAlias = Literal["cpu", "memory", "pids"]
CONTROLLERS: Final[tuple[Controller, ...]] = ("memory", "pids", "cpu")

PERIOD: Final = 100_000  # us over which processor time is counted; the kernel's own default
# Of all inferlets together, where a process, or a group, that nobody has changed has 1,024 (v1) or
# 100 (v2). Measured: docs/decisions.md, "All inferlets weigh a sixteenth of a process".
_SHARES: Final = 64
_WEIGHT: Final = 6


class GroupLimits(Struct, frozen=True, kw_only=True):
    memory: int  # resident, in octets; what is swapped out counts as well, where that is possible
    threads: int
    cpu: int | None = None  # percent of one core


class GroupUsage(Struct, frozen=True):
    memory: int  # octets charged to it
    threads: int
    oom_kills: int  # processes of it that the kernel killed for want of memory
    reached: bool  # its own limit of memory stopped it at least once


class Setting(NamedTuple):
    """`value` is written to `file` of the group of `controller`."""

    controller: Controller
    file: str
    value: str
    optional: bool = False  # a kernel may lack the file, or refuse the value at that time


class Version(NamedTuple):
    """What differs between the two interfaces of the kernel."""

    limits: Callable[[GroupLimits], list[Setting]]
    of_all: Callable[[int], list[Setting]]  # of the parent of all groups; octets
    weight: Setting  # of the parent
    usage: Callable[[Callable[[Controller, str], str]], GroupUsage]  # of a reader of files


def _limits_v1(limits: GroupLimits) -> list[Setting]:
    quota = -1 if limits.cpu is None else PERIOD * limits.cpu // 100
    memory = str(limits.memory)
    with_swap = Setting("memory", "memory.memsw.limit_in_bytes", memory, optional=True)
    return [
        with_swap,  # never below the limit without swap: first when it grows, last when it shrinks
        Setting("memory", "memory.limit_in_bytes", memory),
        with_swap,
        Setting("pids", "pids.max", str(limits.threads)),
        Setting("cpu", "cpu.cfs_quota_us", str(quota)),
    ]


def _limits_v2(limits: GroupLimits) -> list[Setting]:
    quota = "max" if limits.cpu is None else str(PERIOD * limits.cpu // 100)
    return [
        Setting("memory", "memory.swap.max", "0", optional=True),
        Setting("memory", "memory.max", str(limits.memory)),
        Setting("pids", "pids.max", str(limits.threads)),
        Setting("cpu", "cpu.max", f"{quota} {PERIOD}"),
    ]


def _of_all_v1(memory: int) -> list[Setting]:
    return [
        Setting("memory", "memory.use_hierarchy", "1", optional=True),  # always, in new kernels
        Setting("memory", "memory.limit_in_bytes", str(memory)),
        Setting("memory", "memory.memsw.limit_in_bytes", str(memory), optional=True),
    ]


def _of_all_v2(memory: int) -> list[Setting]:
    return [Setting("memory", "memory.max", str(memory))]


def _usage_v1(read: Callable[[Controller, str], str]) -> GroupUsage:
    return GroupUsage(
        memory=int(read("memory", "memory.usage_in_bytes")),
        threads=int(read("pids", "pids.current")),
        oom_kills=flat(read("memory", "memory.oom_control")).get("oom_kill", 0),
        # not memory.failcnt: Linux 6.18 never counts it up
        reached=int(read("memory", "memory.max_usage_in_bytes"))
        >= int(read("memory", "memory.limit_in_bytes")),
    )


def _usage_v2(read: Callable[[Controller, str], str]) -> GroupUsage:
    own = flat(read("memory", "memory.events.local"))
    return GroupUsage(
        memory=int(read("memory", "memory.current")),
        threads=int(read("pids", "pids.current")),
        oom_kills=own["oom_kill"],
        reached=own["max"] > 0 or own["oom"] > 0,  # a lowered limit raises the second only
    )


def flat(text: str) -> dict[str, int]:
    """A flat-keyed file: a name and a number a line."""
    return {name: int(number) for name, number in (line.split() for line in text.splitlines())}


V1: Final = Version(_limits_v1, _of_all_v1, Setting("cpu", "cpu.shares", str(_SHARES)), _usage_v1)
V2: Final = Version(_limits_v2, _of_all_v2, Setting("cpu", "cpu.weight", str(_WEIGHT)), _usage_v2)
