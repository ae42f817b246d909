"""`piehost doctor`: each control, proved; the machine, described."""

from __future__ import annotations

import json
import platform

from .host_harness import Terminal


def test_doctor_proves_every_control(terminal: Terminal) -> None:
    report = json.loads(terminal.run("doctor", "--json", check=0).stdout)
    controls = {control["name"]: control for control in report["controls"]}
    assert {"seccomp", "landlock", "identity", "mounts", "cgroup", "W^X"} <= controls.keys()
    # the machine may lack these; all others it must have
    assert {name for name in controls if not controls[name]["required"]} == {"mounts", "cgroup"}
    assert all(control["ok"] for control in controls.values() if control["required"])
    for control in controls.values():
        assert control["got"] and control["attempted"] and control["stops"]
        assert bool(control["cost"] and control["hint"]) is not control["ok"]
    assert report["machine"]["python"] == platform.python_version()
    assert report["machine"]["kernel"] == platform.release()


def test_doctor_as_a_table(terminal: Terminal) -> None:
    text = terminal.run("doctor", check=0).stdout.decode()
    _, heading, table = text.partition("CONTROL")
    table = table.partition("\n\n")[0]
    rows = {line.split("  ")[0]: line.split()[-1] for line in table.splitlines()[1:]}
    assert heading and "ptrace()" in table
    assert {"identity", "seccomp", "landlock", "mounts", "cgroup"} <= rows.keys()
    assert {name for name, got in rows.items() if got != "ok"} <= {"mounts", "cgroup"}
    assert not any(mark in text for mark in "|│┃─\x1b")
