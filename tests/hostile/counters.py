"""What a server holds, counted from outside: it must be the same before and after an attack."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from piehost.host.cgroups.places import Missing, find
from piehost.host.client import Client

from ..host_harness import family


def counters(client: Client, host: int) -> dict[str, int]:
    """By name. What a process held that has just ended is left out, and so is a difference."""
    stats = client.stats()
    held = {
        "seats": stats.controller.seats,
        "free KV pages": stats.controller.pages_free,
        "free rows": stats.controller.rows_free,
        "free pages of host memory": stats.controller.swap_free,
        "processes": len(family(host)),
        "control groups": len(control_groups(host)),
        "user ids": _locks(set(stats.children.values())),
    }
    for name, pid in {"host": host, **stats.children}.items():
        try:
            descriptors = len(os.listdir(f"/proc/{pid}/fd"))
            mapped = Path(f"/proc/{pid}/maps").read_text().count("/memfd:")
        except (FileNotFoundError, ProcessLookupError):
            continue
        # rings made ahead, of which there are more or fewer: two of each, out and in
        ahead = 2 * stats.rings_ready
        held[f"descriptors of {name}"] = descriptors - ahead * (name in ("host", "backend"))
        held[f"shared memory of {name}"] = mapped - ahead * (name == "backend")
    return held


def resident(pids: list[int]) -> int:
    """The most that these processes together ever had, in octets."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                total += int(line.split()[1]) << 10
    return total


def difference(before: dict[str, int], after: dict[str, int]) -> str:
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return ", ".join(f"{name}: {after.get(name)}, not {before.get(name)}" for name in names)


def control_groups(host: int) -> list[Path]:
    """Folders of the groups that a host has made, of inferlets and for the next ones."""
    found = find(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
    if isinstance(found, Missing):
        return []
    return [path for top in found.folders.values() for path in top.glob(f"piehost-{host}/*/")]


def _locks(pids: set[int]) -> int:
    """Octets of files that these processes have locked: an own user is one."""
    owners = Counter(line.split()[4] for line in Path("/proc/locks").read_text().splitlines()
                     if "->" not in line)  # fmt: skip
    return sum(owners[str(pid)] for pid in pids)
