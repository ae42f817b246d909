"""Where this process may make control groups: in the group that it is in itself, so that whatever
limits it, limits them.

A controller is either in one v2 hierarchy or has a v1 hierarchy of its own, perhaps with others.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from msgspec import Struct

from .limits import CONTROLLERS, V1, V2, Controller, Version

_OCTAL: Final = re.compile(r"\\([0-7]{3})")


class Missing(Struct, frozen=True):
    """There can be no control groups, and why."""

    why: str
    hint: str


class Places(Struct, frozen=True):
    """The folder of our own group for each controller; of v2 it is the same for all."""

    version: Version
    folders: dict[Controller, Path]


def find(mountinfo: str, cgroup: str) -> Places | Missing:
    """From the texts of /proc/self/mountinfo and /proc/self/cgroup. A name in them may hold
    anything but what ends a field or a line, which is a space or a newline there."""
    own = _own_groups(cgroup)
    v1: dict[Controller, Path] = {}
    v2: Path | None = None
    for root, mount, kind, options in _mounts(mountinfo):
        if kind == "cgroup2" and "" in own:
            v2 = v2 or _below(mount, root, own[""])
        elif kind == "cgroup":
            for controller in CONTROLLERS:
                if controller in options and controller in own:
                    folder = _below(mount, root, own[controller])
                    if folder is not None:
                        v1.setdefault(controller, folder)
    if len(v1) == len(CONTROLLERS):
        return Places(V1, {controller: v1[controller] for controller in CONTROLLERS})
    if v2 is not None and not v1:
        return Places(V2, dict.fromkeys(CONTROLLERS, v2))
    if v1:
        lacking = ", ".join(c for c in CONTROLLERS if c not in v1)
        return Missing(
            f"the controllers of this machine are mounted as v1, but not {lacking}",
            "mount all of memory, pids and cpu, or boot with systemd.unified_cgroup_hierarchy=1",
        )
    return Missing(
        "no control groups are mounted here",
        "mount cgroup2 at /sys/fs/cgroup; in a container, give it a writable cgroup namespace",
    )


def _own_groups(cgroup: str) -> dict[str, str]:
    """Controller -> path of our group; the name of v2's is empty. Lines: ID:CONTROLLERS:PATH."""
    groups: dict[str, str] = {}
    for line in cgroup.split("\n")[:-1]:
        _, controllers, path = line.split(":", 2)
        groups |= dict.fromkeys(controllers.split(","), path)
    return groups


def _mounts(mountinfo: str) -> list[tuple[str, Path, str, list[str]]]:
    """(root, mount point, type, super options) of each mount; proc(5)."""
    mounts = []
    for line in mountinfo.split("\n")[:-1]:
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(" "), after.split(" ")[:3]
        mounts.append((_plain(fields[3]), Path(_plain(fields[4])), kind, options.split(",")))
    return mounts


def _plain(path: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), path)


def _below(mount: Path, root: str, group: str) -> Path | None:
    """The folder of `group` in a mount that shows the hierarchy from `root` on; None if it does
    not show it."""
    if group != root and not group.startswith(root.rstrip("/") + "/"):
        return None
    return mount / group[len(root) :].lstrip("/")
