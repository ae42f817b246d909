"""`piehost doctor`: each control, proved; the machine, described."""

from __future__ import annotations

import json
import platform

from .host_harness import Terminal


def test_doctor_proves_every_control(terminal: Terminal) -> None:
    report = json.loads(terminal.run("doctor", "--json", check=0).stdout)
    controls = {control["name"]: control for control in report["controls"]}
    assert {"seccomp", "landlock", "no_new_privs", "fork", "W^X"} <= controls.keys()
    assert all(control["ok"] and control["got"] for control in controls.values())
    assert report["machine"]["python"] == platform.python_version()
    assert report["machine"]["kernel"] == platform.release()


def test_doctor_as_a_table(terminal: Terminal) -> None:
    text = terminal.run("doctor", check=0).stdout.decode()
    assert "CONTROL" in text and "ptrace()" in text and "MISSING" not in text
    assert not any(mark in text for mark in "|│┃─\x1b")
