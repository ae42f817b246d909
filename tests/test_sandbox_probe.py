"""The probe that `piehost doctor` shows: true where all is well, and where something is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import msgspec, sys
from piehost.host.sandbox.probe import probe
sys.stdout.buffer.write(msgspec.json.encode(probe()))
"""
# In a process where these calls do not exist, for it and all it starts.
WITHOUT = """
import ctypes
from piehost.host.sandbox import bpf, kernel, policy
kernel.set_no_new_privs()
leaves = {policy.syscalls()[name]: [bpf._Op(bpf._RET, bpf.ENOSYS)] for name in NAMES}
code = bpf._assemble(leaves, unknown=bpf.ALLOW, foreign=bpf.ALLOW).code
program = kernel.SeccompProgram(code)
assert ctypes.CDLL(None).syscall(317, 1, 0, ctypes.c_void_p(program.address)) == 0
"""


def probe(first: str = "", under: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """The checks by name, from a process of its own."""
    command = [*(under or []), sys.executable, "-P", "-c", first + PROGRAM]
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
    expected |= {"rlimit: memory", "rlimit: descriptors", "rlimit: core", "rlimit: file size"}
    assert expected <= checks.keys()
    assert checks["seccomp"]["got"] == "killed: ptrace"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_it_runs_as_a_plain_user_too() -> None:
    """Without any privilege but to pass closed folders, in one of which this Python may lie."""
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    become += ["--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"]
    checks = probe(under=become)
    assert {name: check["got"] for name, check in checks.items() if not check["ok"]} == {}


@pytest.mark.parametrize("missing", ["landlock", "seccomp"])
def test_a_missing_control_is_found(missing: str) -> None:
    call = {"landlock": "landlock_create_ruleset", "seccomp": "seccomp"}[missing]
    checks = probe(f"NAMES = {[call]}" + WITHOUT)
    assert not checks[missing]["ok"] and "no " + missing in checks[missing]["got"]
    assert missing in checks[missing]["hint"] or "kernel" in checks[missing]["hint"]
    if missing == "seccomp":
        assert not checks["network"]["ok"] and missing in checks["network"]["hint"]
    else:  # without capabilities, a process that is not dumpable is closed to its siblings
        assert checks["siblings: memory"]["ok"]
    assert checks["no_new_privs"]["ok"] and checks["rlimit: memory"]["ok"]
