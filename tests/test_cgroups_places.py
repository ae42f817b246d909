"""Where control groups are: in v1, in v2, in a container; in which files of v2 the limits go."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from piehost.host.cgroups import GroupLimits, Missing
from piehost.host.cgroups.limits import CONTROLLERS, V1, V2
from piehost.host.cgroups.places import Places, find
from piehost.host.cgroups.tree import Tree

from .cgroup_fixtures import MIB
from .cgroup_fixtures import cgroups as cgroups


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


def test_a_tree_that_cannot_be_locked_is_given_up(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="lock"):
            Tree(Places(V1, dict.fromkeys(CONTROLLERS, tmp_path)), None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
