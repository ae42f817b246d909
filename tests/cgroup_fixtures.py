"""Control groups for tests, which skip where there are none, and the folders a process is in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from piehost.host.cgroups import Groups, Missing, detect
from piehost.host.cgroups.places import Places, find

MIB = 1 << 20


@pytest.fixture(scope="module")
def cgroups() -> None:
    """Skips where there are none."""
    found = detect(lambda call: call())
    if isinstance(found, Missing):
        fail_unless_lacking(found)
        pytest.skip(found.why)
    found.close()


@pytest.fixture
def groups(cgroups: None) -> Iterator[Groups]:
    found = detect(lambda call: call())
    assert isinstance(found, Groups)
    yield found
    found.close()


def fail_unless_lacking(missing: Missing) -> None:
    """Groups that were made and do not hold are a fault of ours, not of the machine."""
    assert "do not hold" not in missing.why, missing.why


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
