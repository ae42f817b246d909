"""The probe that `piehost doctor` shows: true where all is well, and where something is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from .plain_user import under
from .sandbox_harness import without

root_only = pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
PROGRAM = """
import msgspec, sys
from piehost.host.sandbox.probe import probe
sys.stdout.buffer.write(msgspec.json.encode(probe()))
"""


def probe(first: str = "", become: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """The checks by name, from a process of its own, run by `become`."""
    command = [*become, sys.executable, "-P", "-c", first + PROGRAM]
    result = subprocess.run(command, capture_output=True, timeout=90)
    assert result.returncode == 0, result.stderr.decode()
    return {check["name"]: check for check in json.loads(result.stdout)}


def test_every_control_is_proved_here() -> None:
    checks = probe()
    assert {name: check["got"] for name, check in checks.items() if not check["ok"]} == {}
    assert all(
        check["hint"] == "" and check["attempted"] and check["stops"] for check in checks.values()
    )
    expected = {"seccomp", "landlock", "no_new_privs", "W^X", "network", "memfd", "pidfd", "fork"}
    expected |= {"exec (native)", "exec (Python)", "siblings: memory", "siblings: signals"}
    expected |= {"identity", "mounts", "capabilities", "rlimit: threads", "rlimit: memory"}
    expected |= {"rlimit: descriptors", "rlimit: core", "rlimit: file size"}
    assert expected <= checks.keys()
    assert checks["seccomp"]["got"] == "killed: ptrace"


@root_only
def test_it_runs_as_a_plain_user_too() -> None:
    checks = probe(become=under("plain"))
    assert {name: check["got"] for name, check in checks.items() if not check["ok"]} == {}
    assert "namespace" in checks["identity"]["got"]


# root as containers have it: in Docker by default, where namespaces may be made, and with nothing
CAPABILITIES = {
    "docker": ["kill", "setgid", "setuid", "dac_override", "chown", "sys_chroot"],
    "namespaces": ["kill", "setgid", "setuid", "dac_override", "setfcap"],
    "nothing": [],
}
NAMESPACES = ("unshare", "setns", "mount", "pivot_root")


@root_only
@pytest.mark.parametrize("container", CAPABILITIES)
def test_it_runs_as_root_of_a_container(container: str) -> None:
    kept = ",".join(f"+{name}" for name in CAPABILITIES[container])
    become = ["setpriv", f"--bounding-set=-all{kept and ','}{kept}", "--inh-caps=-all"]
    checks = probe("" if container == "namespaces" else without(*NAMESPACES), become)
    missing = {name for name, check in checks.items() if not check["ok"]}
    assert (
        missing
        == {
            "docker": {"mounts"},
            "namespaces": set(),
            "nothing": {"mounts", "identity", "rlimit: threads"},
        }[container]
    )
    assert all(checks[name]["cost"] and checks[name]["hint"] for name in missing)
    assert not checks["mounts"]["required"] and checks["identity"]["required"]


def test_a_machine_without_namespaces_has_no_mounts() -> None:
    checks = probe(without("mount"))
    assert checks["mounts"]["got"] == "done" and "Linux 5.12" in checks["mounts"]["hint"]


@pytest.mark.parametrize("missing", ["landlock", "seccomp"])
def test_a_missing_control_is_found(missing: str) -> None:
    call = {"landlock": "landlock_create_ruleset", "seccomp": "seccomp"}[missing]
    checks = probe(without(call))
    assert not checks[missing]["ok"] and "no " + missing in checks[missing]["got"]
    assert missing in checks[missing]["hint"] or "kernel" in checks[missing]["hint"]
    if missing == "seccomp":
        assert not checks["network"]["ok"] and missing in checks["network"]["hint"]
    else:  # without capabilities, a process that is not dumpable is closed to its siblings
        assert checks["siblings: memory"]["ok"]
    assert checks["no_new_privs"]["ok"] and checks["rlimit: memory"]["ok"]
