"""Control groups of processes: what they limit, one by one and together, and what is left of them.

Where the machine has none that we may use, these tests are skipped with its reason.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from piehost.host.cgroups import Fault, Group, GroupLimits, Groups, detect
from piehost.host.cgroups.limits import CONTROLLERS
from piehost.host.process_use import process_use

from .cgroup_fixtures import MIB, folders_of
from .cgroup_fixtures import cgroups as cgroups
from .cgroup_fixtures import groups as groups
from .host_harness import eventually


@contextlib.contextmanager
def python(source: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `source` and has printed a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def join(group: Group, pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    group.join(pid, pidfd)
    os.close(pidfd)


def has_joined(group: Group) -> bool:
    usage = group.usage()
    return usage is not None and usage.threads > 0


def test_a_group_is_gone_when_its_process_is(groups: Groups) -> None:
    group = groups.take(GroupLimits(memory=64 * MIB, threads=8), lambda _: None)
    with python("print(); input()") as process:
        join(group, process.pid)
        assert eventually(partial(has_joined, group))
        assert all(folder.is_dir() for folder in group.folders)
        group.end()  # asked too early: it waits
        assert has_joined(group)
    assert eventually(lambda: not any(folder.exists() for folder in group.folders))


def test_who_holds_too_much_when_it_joins_is_told_of(groups: Groups) -> None:
    faults: list[Fault] = []
    with python("held = b'x' * (64 << 20); print(); input()") as process:
        join(groups.take(GroupLimits(memory=32 * MIB, threads=8), faults.append), process.pid)
        assert eventually(lambda: [fault.code for fault in faults] == ["memory"])
    source = "import threading; [threading.Thread(target=input).start() for _ in '1234']; print()"
    with python(source) as process:
        join(groups.take(GroupLimits(memory=1 << 30, threads=3), faults.append), process.pid)
        assert eventually(lambda: [fault.code for fault in faults] == ["memory", "threads"])


def test_a_limit_below_what_is_held_ends_or_is_told_of(groups: Groups) -> None:
    """v2 kills by itself; v1 refuses the limit."""
    faults: list[Fault] = []
    group = groups.take(GroupLimits(memory=256 * MIB, threads=8), faults.append)
    with python("print(); input(); held = b'x' * (64 << 20); print(); input()") as process:
        join(group, process.pid)
        assert eventually(partial(has_joined, group))
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout is not None
        process.stdout.readline()
        group.set(GroupLimits(memory=16 * MIB, threads=8))
        assert eventually(lambda: bool(faults) or process.poll() is not None)
        assert [fault.code for fault in faults] in ([], ["memory"])


def test_the_dead_are_not_moved(groups: Groups) -> None:
    """Nor is there a fault: their pid may be another's by then."""
    faults: list[Fault] = []
    group = groups.take(GroupLimits(memory=64 * MIB, threads=8), faults.append)
    with python("print()") as process:
        pidfd = os.pidfd_open(process.pid)
        process.wait()
        group.join(process.pid, pidfd)
        os.close(pidfd)
    group.end()
    assert eventually(lambda: not any(folder.exists() for folder in group.folders))
    assert faults == []


def test_groups_that_end_before_they_are_made(groups: Groups) -> None:
    """More at once than are ready; each is changed and ended as soon as it is had."""
    faults: list[Fault] = []
    limits = GroupLimits(memory=64 * MIB, threads=8)
    taken = [groups.take(limits, faults.append) for _ in range(80)]
    for group in taken:
        group.set(GroupLimits(memory=32 * MIB, threads=8))
        group.end()
    last = groups.take(limits, faults.append)  # is made and filled after all of them
    with python("print(); input()") as process:
        join(last, process.pid)
        assert eventually(partial(has_joined, last))
    assert [group for group in taken if any(f.exists() for f in group.folders)] == []
    assert faults == []


def test_a_host_with_many_descriptors_moves_what_it_starts(groups: Groups) -> None:
    """Beyond 1,023, which select(2) does not take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    faults: list[Fault] = []
    with contextlib.ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        process = stack.enter_context(python("print(); input()"))
        for _ in range(1100):
            stack.callback(os.close, os.dup(0))
        group = groups.take(GroupLimits(memory=64 * MIB, threads=8), faults.append)
        join(group, process.pid)
        assert eventually(partial(has_joined, group))
        group.end()
    assert faults == []


def test_all_together_have_a_cap(cgroups: None) -> None:
    """Each within its own, and yet too much."""
    groups = detect(lambda call: call(), memory=96 * MIB)
    assert isinstance(groups, Groups)
    source = "print(); input(); held = b'x' * (64 << 20); print(); input()"
    with contextlib.closing(groups), python(source) as one, python(source) as two:
        taken = [groups.take(GroupLimits(memory=80 * MIB, threads=8), lambda _: None) for _ in "12"]
        for process, group in zip((one, two), taken, strict=True):
            join(group, process.pid)
            assert eventually(partial(has_joined, group))
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout is not None
            process.stdout.readline()
        ended = [-signal.SIGKILL, None]  # its pipe is closed a moment before it has ended
        assert eventually(lambda: ended in ([one.poll(), two.poll()], [two.poll(), one.poll()]))
        killed = taken[0 if two.poll() is None else 1].usage()
        assert killed is not None
        assert (killed.oom_kills, killed.reached) == (1, False)


def test_a_process_of_the_server_goes_before_all_groups_together(groups: Groups) -> None:
    """Three that spin in groups have, of a core that one outside wants too, the least part."""
    spin = "import os; os.setsid(); os.sched_setaffinity(0, {%d}); print(flush=True)\nwhile 1: pass"
    source = spin % min(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        inside = [stack.enter_context(python(source)) for _ in range(3)]
        taken = [
            groups.take(GroupLimits(memory=1 << 30, threads=8), lambda _: None) for _ in inside
        ]
        for process, group in zip(inside, taken, strict=True):
            join(group, process.pid)
        assert eventually(lambda: all(len(folders_of(p.pid)) == len(CONTROLLERS) for p in inside))
        outside = stack.enter_context(python(source))
        before = sum(process_use(process.pid).cpu_seconds for process in inside)
        assert eventually(lambda: process_use(outside.pid).cpu_seconds > 0.4)
        taken_inside = sum(process_use(process.pid).cpu_seconds for process in inside) - before
        assert taken_inside < 0.5 * process_use(outside.pid).cpu_seconds
