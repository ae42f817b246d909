"""Control groups: what they limit, what is left of them, what happens where there are none.

Where the machine has none that we may use, the tests that need them are skipped with its reason.
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
from pathlib import Path

import pytest

from piehost.host.cgroups import Fault, Group, GroupLimits, Groups, Missing, detect
from piehost.host.cgroups.limits import CONTROLLERS, V1, V2
from piehost.host.cgroups.places import Places, find
from piehost.host.cgroups.tree import Tree
from piehost.host.client import Client, Run
from piehost.host.errors import FailedAnswer
from piehost.host.process_use import process_use
from piehost.wire import client as wire

from .host_harness import (
    DEADLINE,
    PIEHOST,
    SMALL,
    WAIT,
    Server,
    Terminal,
    compile_c,
    eventually,
    write_program,
)

MIB = 1 << 20
SPIN = "int main(void) { for (volatile unsigned long n = 0;; n++); }"
# takes memory for ever, 1 MiB at a time
TAKE = """
#include <stdlib.h>
#include <string.h>
int main(void) { for (;;) { char *block = malloc(1 << 20); if (block) memset(block, 1, 1 << 20); } }
"""
# has 48 MiB, says so, and waits to be ended
HOLD = """
    from inferlet import receive, send

    held = bytearray(48 << 20)
    send("ready")
    receive().result()
"""
# starts threads until it may not, and says how many it then has
THREADS = """
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>
static void *wait_for_ever(void *nothing) { for (;;) sleep(1000); return nothing; }
int main(void)
{
    pthread_t thread;
    int count = 1;
    struct timespec moved = {0, 300000000};
    nanosleep(&moved, 0);
    while (count < 100 && !pthread_create(&thread, NULL, wait_for_ever, NULL)) count++;
    printf("%d\\n", count);
    fflush(stdout);
    _exit(0);
}
"""


@pytest.fixture(scope="module")
def cgroups() -> None:
    """Skips where there are none."""
    found = detect(lambda call: call())
    if isinstance(found, Missing):
        pytest.skip(found.why)
    found.close()


@pytest.fixture
def groups(cgroups: None) -> Iterator[Groups]:
    found = detect(lambda call: call())
    assert isinstance(found, Groups)
    yield found
    found.close()


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


def first_message(run: Run) -> bytes:
    return next(event.data for event in run.events() if isinstance(event, wire.Message))


def is_in_group(run: Run) -> bool:
    return len(folders_of(run.pid)) == len(CONTROLLERS)


def folders_of(pid: int) -> list[Path]:
    """The control groups that a process is in, those that a host made for it."""
    mounts = Path("/proc/self/mountinfo").read_text()
    places = find(mounts, Path(f"/proc/{pid}/cgroup").read_text())
    assert isinstance(places, Places)
    return [
        f
        for f in places.folders.values()
        if f.parent.name[:8] == "piehost-" and f.name != "launchers"
    ]


def throttled(pid: int) -> int:
    """How often its group was held back."""
    (stat,) = {f / "cpu.stat" for f in folders_of(pid) if (f / "cpu.stat").exists()}
    return int(dict(line.split() for line in stat.read_text().splitlines())["nr_throttled"])


# --- where ---------------------------------------------------------------------------------------


def mount(root: str, at: str, kind: str, options: str) -> str:
    return f"30 25 0:26 {root} {at} rw,nosuid shared:4 - {kind} {kind} {options}\n"


V1_MOUNTS = (
    mount("/", "/sys/fs/cgroup/cpu,cpuacct", "cgroup", "rw,cpu,cpuacct")
    + mount("/", "/sys/fs/cgroup/memory", "cgroup", "rw,memory")
    + mount("/", "/sys/fs/cgroup/pids", "cgroup", "rw,pids")
)
UNIFIED = mount("/", "/sys/fs/cgroup", "cgroup2", "rw")


def test_our_own_group_is_found_in_v1_v2_and_containers() -> None:
    v1 = find(V1_MOUNTS, "5:memory:/a b\n4:pids:/\n3:cpu,cpuacct:/service\n0::/\n")
    root = Path("/sys/fs/cgroup")
    assert v1 == Places(
        V1,
        {"memory": root / "memory/a b", "pids": root / "pids", "cpu": root / "cpu,cpuacct/service"},
    )
    v2 = find(UNIFIED, "0::/user.slice/piehost.service\n")
    assert v2 == Places(V2, dict.fromkeys(CONTROLLERS, root / "user.slice/piehost.service"))
    # v1 for all controllers that matter, and an empty v2: as systemd's "hybrid" has it
    hybrid = V1_MOUNTS + mount("/", "/sys/fs/cgroup/unified", "cgroup2", "rw")
    assert find(hybrid, "5:memory:/a b\n4:pids:/\n3:cpu,cpuacct:/service\n0::/\n") == v1
    # a container sees the hierarchy from its own group on
    inside = mount("/docker/1f", "/cgroups\\040here", "cgroup2", "rw")
    here = find(inside, "0::/docker/1f/app\n")
    assert here == Places(V2, dict.fromkeys(CONTROLLERS, Path("/cgroups here/app")))
    # whoever may mount chooses names; a source may be empty
    odd = mount("/", "/mnt/\u2028\udcff\u3000\x0b", "tmpfs", "rw")
    odd += "1 2 0:3 / /mnt rw - tmpfs  rw\n"
    assert find(odd + UNIFIED, "0::/\n") == Places(V2, dict.fromkeys(CONTROLLERS, root))


@pytest.mark.parametrize(
    ("mountinfo", "cgroup", "why"),
    [
        ("", "0::/\n", "no control groups are mounted"),
        (mount("/other", "/sys/fs/cgroup", "cgroup2", "rw"), "0::/\n", "no control groups"),
        (V1_MOUNTS.replace("pids", "hugetlb"), "3:cpu:/\n5:memory:/\n0::/\n", "not pids"),
    ],
)
def test_what_is_lacking_is_named(mountinfo: str, cgroup: str, why: str) -> None:
    missing = find(mountinfo, cgroup)
    assert isinstance(missing, Missing)
    assert why in missing.why
    assert missing.hint


def test_v2_files_say_what_the_limits_are(tmp_path: Path) -> None:
    """In a folder that only looks like v2's, with a service's group that has us in it."""
    (tmp_path / "cgroup.type").write_text("domain\n")
    (tmp_path / "cgroup.procs").write_text(f"{os.getpid()}\n")
    tree = Tree(Places(V2, dict.fromkeys(CONTROLLERS, tmp_path)), 3 << 30)
    name = f"piehost-{os.getpid()}"
    # a group with controlled groups may hold no process, so we have moved
    assert (tmp_path / f"{name}.host" / "cgroup.procs").read_text() == str(os.getpid())
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"
    assert (tmp_path / name / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"
    assert (tmp_path / name / "memory.max").read_text() == str(3 << 30)
    tree.put_server_first()
    assert int((tmp_path / name / "cpu.weight").read_text()) < 100
    tree.make("1")
    tree.limit("1", GroupLimits(memory=64 * MIB, threads=8, cpu=150))
    tree.attach("1", 4321)
    (folder,) = tree.folders("1")
    assert folder == tmp_path / name / "1"
    written = {file.name: file.read_text() for file in folder.iterdir()}
    assert written == {
        "memory.max": str(64 * MIB),
        "memory.swap.max": "0",
        "pids.max": "8",
        "cpu.max": "150000 100000",
        "cgroup.procs": "4321",
    }
    tree.separate("backend", 1234)
    assert (tmp_path / f"{name}.backend" / "cgroup.procs").read_text() == "1234"
    tree.limit("1", GroupLimits(memory=64 * MIB, threads=8))
    assert (folder / "cpu.max").read_text() == "max 100000"
    (folder / "memory.current").write_text("4096\n")
    (folder / "pids.current").write_text("2\n")
    (folder / "memory.events.local").write_text("low 0\nhigh 0\nmax 3\noom 1\noom_kill 1\n")
    usage = tree.usage("1")
    assert (usage.memory, usage.threads, usage.oom_kills, usage.reached) == (4096, 2, 1, True)


def test_v2_leaves_a_group_alone_in_which_others_live(tmp_path: Path) -> None:
    (tmp_path / "cgroup.type").write_text("domain\n")
    (tmp_path / "cgroup.procs").write_text(f"{os.getpid()}\n{os.getppid()}\n")
    with pytest.raises(OSError, match="other processes"):
        Tree(Places(V2, dict.fromkeys(CONTROLLERS, tmp_path)), None)
    assert {file.name for file in tmp_path.iterdir()} == {"cgroup.type", "cgroup.procs"}


# --- groups --------------------------------------------------------------------------------------


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


def test_a_tree_that_cannot_be_locked_is_given_up(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="lock"):
            Tree(Places(V1, dict.fromkeys(CONTROLLERS, tmp_path)), None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


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
        codes = [process.poll() for process in (one, two)]
        assert -signal.SIGKILL in codes
        killed = taken[codes.index(-signal.SIGKILL)].usage()
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


# --- inferlets -----------------------------------------------------------------------------------


def test_memory_is_held_to_its_quota_and_the_end_is_typed(
    cgroups: None, client: Client, tmp_path: Path
) -> None:
    quotas = {"memory": "32MiB", "address_space": "8GiB"}
    run = client.launch(compile_c(tmp_path, "take", TAKE), quotas=quotas)
    reason = run.result(timeout=DEADLINE).reason
    assert reason is not None
    assert (reason.code, reason.why) == ("memory", "quota memory is 32MiB")
    assert "--quota memory" in reason.hint


def test_threads_are_held_to_their_quota(cgroups: None, client: Client, tmp_path: Path) -> None:
    program = compile_c(tmp_path, "threads", THREADS)
    result = client.launch(program, quotas={"threads": "8"}).result(timeout=DEADLINE)
    assert (result.code, result.stdout) == (0, b"8\n")


def test_processor_time_is_held_to_its_quota(cgroups: None, client: Client, tmp_path: Path) -> None:
    """Also one that is given while it runs; and one without is not held back."""
    spin = compile_c(tmp_path, "spin", SPIN)
    free, held = client.launch(spin), client.launch(spin, quotas={"cpu": "1%"})
    for run in (free, held):
        next(event for event in run.events() if isinstance(event, wire.Started))
        assert eventually(partial(is_in_group, run))
    assert eventually(lambda: throttled(held.pid) > 2)
    assert throttled(free.pid) == 0
    client.set_quota(free.id, {"cpu": "1"})
    assert eventually(lambda: throttled(free.pid) > 2)
    for run in (free, held):
        run.cancel()
        run.result(timeout=DEADLINE)


def test_memory_can_be_lowered_while_it_runs(cgroups: None, client: Client, tmp_path: Path) -> None:
    run = client.launch(write_program(tmp_path, "hold.py", HOLD))
    assert first_message(run) == b"ready"
    assert eventually(partial(is_in_group, run))
    client.set_quota(run.id, {"memory": "16MiB"})
    reason = run.result(timeout=DEADLINE).reason
    assert reason is not None
    assert reason.code == "memory"


def test_the_group_of_an_inferlet_goes_with_it(
    cgroups: None, client: Client, tmp_path: Path
) -> None:
    run = client.launch(write_program(tmp_path, "wait.py", WAIT))
    assert first_message(run) == b"ready"
    assert eventually(partial(is_in_group, run))
    folders = folders_of(run.pid)
    run.cancel()
    run.result(timeout=DEADLINE)
    assert eventually(lambda: not any(folder.exists() for folder in folders))


def test_nothing_is_left_of_a_host_that_was_killed(
    cgroups: None, terminal: Terminal, tmp_path: Path
) -> None:
    """The next host removes it, and nothing of those that live."""
    wait = write_program(tmp_path, "wait.py", WAIT)
    living = detect(lambda call: call())
    assert isinstance(living, Groups)
    taken = living.take(GroupLimits(memory=MIB, threads=1), lambda _: None)
    with contextlib.closing(living):
        assert eventually(lambda: all(folder.exists() for folder in taken.folders))
        with terminal.server("--model", "scripted") as first:
            with first.client() as client:
                run = client.launch(wait)
                assert first_message(run) == b"ready"
                assert eventually(partial(is_in_group, run))
                left = {folder.parent for folder in folders_of(run.pid)}
            first.process.kill()
            first.process.wait()
            assert all(folder.exists() for folder in left)
        with terminal.server("--model", "scripted") as second, second.client() as client:
            run = client.launch(wait)
            assert first_message(run) == b"ready"
            assert eventually(lambda: not any(folder.exists() for folder in left))
        assert all(folder.exists() for folder in taken.folders)


@contextlib.contextmanager
def server_without_cgroups(terminal: Terminal) -> Iterator[Server]:
    """It sees an empty folder where they should be."""
    hide = 'mount -t tmpfs none /sys/fs/cgroup && exec "$@"'
    process = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", hide, "sh", *PIEHOST, "serve", *SMALL, "--model", "scripted"],
        env=terminal.environment,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"piehost: serving")
        yield Server(terminal, process)
    finally:
        process.terminate()
        process.communicate(timeout=DEADLINE)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can hide them")
def test_without_control_groups_what_needs_them_is_refused_or_given_up(
    terminal: Terminal, tmp_path: Path
) -> None:
    wait = write_program(tmp_path, "wait.py", WAIT)
    with server_without_cgroups(terminal) as server, server.client() as client:
        for key, value in (("cpu", "50%"), ("memory", "64MiB")):
            with pytest.raises(FailedAnswer) as refused:
                client.launch(wait, quotas={key: value}).result(timeout=DEADLINE)
            reason = refused.value.reason
            assert reason.code == "cgroup"
            assert key in reason.what
            assert "cannot make groups in /sys/fs/cgroup" in reason.why
            assert "--allow-degraded cgroup" in reason.hint
        for options in ({}, {"quotas": {"cpu": "50%"}, "waived": ["cgroup"]}):
            run = client.launch(wait, **options)  # type: ignore[arg-type]
            assert first_message(run) == b"ready"
            # the least that can be done for the server
            assert os.getpriority(os.PRIO_PROCESS, run.pid) > os.getpriority(os.PRIO_PROCESS, 0)
            with pytest.raises(FailedAnswer) as refused:
                client.set_quota(run.id, {"cpu": "10%"})
            assert refused.value.reason.code == "cgroup"
            run.cancel()
            run.result(timeout=DEADLINE)
