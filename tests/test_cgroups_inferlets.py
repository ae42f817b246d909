"""Control groups of inferlets: quotas that hold, what is left of them, and a host that has none.

Where the machine has none that we may use, the tests that need them are skipped with its reason.
"""

from __future__ import annotations

import contextlib
import os
from functools import partial
from pathlib import Path

import pytest

from piehost.host.cgroups import GroupLimits, Groups, detect
from piehost.host.cgroups.limits import CONTROLLERS
from piehost.host.client import Client, Run
from piehost.host.errors import FailedAnswer
from piehost.wire import client as wire

from .cgroup_fixtures import MIB, folders_of
from .cgroup_fixtures import cgroups as cgroups
from .host_harness import (
    DEADLINE,
    SCRIPTED,
    WAIT,
    Terminal,
    compile_c,
    eventually,
    write_program,
)

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


# before a command: it sees an empty folder where they should be
HIDE_CGROUPS = (
    *("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /sys/fs/cgroup && exec "$@"', "sh"),
)


def first_message(run: Run) -> bytes:
    return next(event.data for event in run.events() if isinstance(event, wire.Message))


def is_in_group(run: Run) -> bool:
    return len(folders_of(run.pid)) == len(CONTROLLERS)


def throttled(pid: int) -> int:
    """How often its group was held back."""
    (stat,) = {f / "cpu.stat" for f in folders_of(pid) if (f / "cpu.stat").exists()}
    return int(dict(line.split() for line in stat.read_text().splitlines())["nr_throttled"])


# --- quotas --------------------------------------------------------------------------------------


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


# --- what is left --------------------------------------------------------------------------------


def test_the_group_of_an_inferlet_goes_with_it(
    cgroups: None, client: Client, tmp_path: Path
) -> None:
    run = client.launch(write_program(tmp_path, "wait.py", WAIT))
    assert first_message(run) == b"ready"
    assert eventually(partial(is_in_group, run))
    folders = folders_of(run.pid)
    details = client.inspect(run.id).details
    assert details is not None
    assert {*details.cgroups} == {str(folder) for folder in folders}
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


# --- a host without ------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can hide them")
def test_without_control_groups_what_needs_them_is_refused_or_given_up(
    terminal: Terminal, tmp_path: Path
) -> None:
    wait = write_program(tmp_path, "wait.py", WAIT)
    with terminal.server(*SCRIPTED, under=HIDE_CGROUPS) as server, server.client() as client:
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
