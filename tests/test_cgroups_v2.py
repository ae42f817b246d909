"""Real control groups of version 2: a host in a group of its own, as a service manager starts it.

Where no such group can be made (v1, not root, a container that may not), all of this is skipped
with the reason.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from piehost.host.cgroups import Groups, Missing, detect
from piehost.host.cgroups.limits import CONTROLLERS, V2
from piehost.host.cgroups.places import find
from piehost.host.errors import FailedAnswer

from .cgroup_fixtures import MIB, folders_of
from .host_harness import (
    DEADLINE,
    SCRIPTED,
    WAIT,
    Server,
    Terminal,
    compile_c,
    eventually,
    started,
    write_program,
)
from .plain_user import PLAIN_USER, USERS, under

# takes memory for ever, 1 MiB at a time
TAKE = """
#include <stdlib.h>
#include <string.h>
int main(void) { for (;;) { char *block = malloc(1 << 20); if (block) memset(block, 1, 1 << 20); } }
"""
JOIN = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
HIDE = 'mount -o remount,bind,ro "$0" && exec "$@"'
DETECT = """
from piehost.host.cgroups import Missing, detect
found = detect(lambda call: call())
assert isinstance(found, Missing)
print(found.why, found.hint)
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """One like a service's, with nobody in it."""
    mounts = Path("/proc/self/mountinfo").read_text()
    own, root = find(mounts, Path("/proc/self/cgroup").read_text()), find(mounts, "0::/\n")
    if isinstance(own, Missing) or isinstance(root, Missing) or own.version is not V2:
        pytest.skip("the controllers of this machine are not mounted as v2 from the root on")
    made = root.folders["memory"] / f"pie-tests-{os.getpid()}"
    try:
        made.mkdir()
    except OSError as error:
        pytest.skip(f"cannot make {made}: {error.strerror}")
    try:
        if not {*CONTROLLERS} <= {*(made / "cgroup.controllers").read_text().split()}:
            pytest.skip(f"{made.parent} does not give its groups memory, pids and cpu")
        yield made
    finally:
        for folder in groups_in(made):
            folder.rmdir()
        made.rmdir()


def groups_in(group: Path) -> list[Path]:
    """Those inside others first."""
    return [Path(path) for path, _, _ in os.walk(group, topdown=False) if path != str(group)]


def group_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text().strip().removeprefix("0::/")


@contextlib.contextmanager
def serving(group: Path, terminal: Terminal, user: str = "root") -> Iterator[Server]:
    """A host that is put into the group as it starts; a plain user's group is its own."""
    if user == "plain":
        delegated = ("cgroup.procs", "cgroup.subtree_control", "cgroup.threads")
        for path in (terminal.directory, group, *(group / name for name in delegated)):
            os.chown(path, PLAIN_USER, PLAIN_USER)
    joined = ("sh", "-c", JOIN, group, *under(user, terminal.directory))
    with terminal.server(*SCRIPTED, under=joined) as server:
        yield server


@pytest.mark.parametrize("user", USERS)
def test_a_host_alone_in_its_group_divides_it(user: str, group: Path, terminal: Terminal) -> None:
    """Between itself, the server's processes and all inferlets; and leaves it as it was."""
    wait = write_program(terminal.directory, "wait.py", WAIT)
    take = compile_c(terminal.directory, "take", TAKE)
    with serving(group, terminal, user) as server, server.client() as client:
        run = started(client, wait)
        assert eventually(lambda: folders_of(run.pid) != [])
        (all_groups,) = {folder.parent for folder in folders_of(run.pid)}
        assert all_groups.parent == group
        ours = {"host": server.process.pid}
        ours |= {name: server.child(name) for name in ("backend", "controller")}
        own = {name: f"{group.name}/{all_groups.name}.{name}" for name in ours}
        assert eventually(lambda: {name: group_of(pid) for name, pid in ours.items()} == own)
        quotas = {"memory": "32MiB", "address_space": "8GiB"}
        reason = client.launch(take, quotas=quotas).result(timeout=DEADLINE).reason
        assert reason is not None
        assert (reason.code, reason.why) == ("memory", "quota memory is 32MiB")
    assert groups_in(group) == []


def test_a_host_beside_others_in_its_group_moves_nobody(group: Path, terminal: Terminal) -> None:
    wait = write_program(terminal.directory, "wait.py", WAIT)
    other = subprocess.Popen(["sh", "-c", JOIN, group, "sleep", "1000"])
    try:
        assert eventually(lambda: group_of(other.pid) == group.name)
        with serving(group, terminal) as server, server.client() as client:
            with pytest.raises(FailedAnswer) as refused:
                client.launch(wait, quotas={"memory": "64MiB"}).result(timeout=DEADLINE)
            assert refused.value.reason.code == "cgroup"
            assert f"other processes live in the group {group}" in refused.value.reason.why
            run = started(client, wait)  # it asks for nothing that would take groups
            assert {group_of(pid) for pid in (run.pid, server.process.pid)} == {group.name}
            assert groups_in(group) == []
    finally:
        other.kill()
        other.wait()


def test_limits_of_others_hold_when_a_host_in_the_root_ends(group: Path) -> None:
    if Path("/proc/self/cgroup").read_text() != "0::/\n" or (group.parent / "cgroup.type").exists():
        pytest.skip("these tests do not run in the root group")
    (group / "memory.max").write_text(str(64 * MIB))
    found = detect(lambda call: call())
    assert isinstance(found, Groups)
    server = subprocess.Popen(["sleep", "1000"])
    try:
        found.place([], {"backend": server.pid})
        assert eventually(lambda: group_of(server.pid).endswith(".backend"))
    finally:
        server.kill()
        server.wait()
        found.close()
    assert (group / "memory.max").read_text() == f"{64 * MIB}\n"


def test_groups_that_cannot_be_written_are_told_of(group: Path) -> None:
    command = [sys.executable, "-P", "-c", DETECT]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", HIDE, group.parent, *command],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert "Read-only file system mount cgroup2 writable" in done.stdout, done.stderr
