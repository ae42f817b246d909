"""The compiled filters against `policy_oracle.py`, which reads the policies on its own."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from piehost.host.sandbox import bpf, policy

from .policy_oracle import (
    ALLOW,
    AT_START,
    ENOSYS,
    EPERM,
    I386,
    KILL,
    NOTIFY,
    PROFILES,
    TRACE,
    X86_64,
    Calls,
    Oracle,
    flipped,
    random_calls,
    simulate,
)

# of each profile, under each kind of launcher; `make fuzz` raises it
RANDOM_CALLS = int(os.environ.get("PIEHOST_FUZZ_CALLS", "200000"))
AT_ONCE = 100_000
MOST_CALLS = {"native": 41, "dynamic": 44, "python": 69, "perl": 48, "node": 66}


def compiled(name: str, forbidden: int) -> bytes:
    made = bpf.compile_policy(policy.load(name), forbidden)
    code = bytearray(made.code)
    for placeholder, value in AT_START.items():
        made.fill(code, placeholder, value)
    return bytes(code)


def differing(oracle: Oracle, code: bytes, calls: Calls, forbidden: int) -> dict[int, int]:
    """How often each answer came. AssertionError if filter and oracle do not agree."""
    got, expected = simulate(code, calls), oracle.answers(calls, forbidden)
    wrong = np.flatnonzero(got != expected)
    if wrong.size:
        at = wrong[0]
        number = int(calls.numbers[at])
        raise AssertionError(
            f"{wrong.size} calls; the first: {oracle.names.get(number, number)}"
            f"({', '.join(map(hex, calls.arguments[:, at].tolist()))}) of architecture "
            f"{calls.archs[at]:#x}: the filter says {got[at]:#x}, the policy {expected[at]:#x}"
        )
    return dict(zip(*(each.tolist() for each in np.unique(got, return_counts=True)), strict=True))


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("forbidden", [KILL, TRACE])
def test_a_filter_does_what_its_policy_says(name: str, forbidden: int) -> None:
    oracle, code = Oracle(name), compiled(name, forbidden)
    differing(oracle, code, flipped(oracle), forbidden)
    rng = np.random.default_rng(20240601)
    answers = {ALLOW: 0, KILL: 0, forbidden: 0, EPERM: 0, ENOSYS: 0}
    for first in range(0, RANDOM_CALLS, AT_ONCE):
        calls = random_calls(oracle, min(AT_ONCE, RANDOM_CALLS - first), rng)
        for answer, count in differing(oracle, code, calls, forbidden).items():
            answers[answer] += count
    assert min(answers.values()) > RANDOM_CALLS // 200, "the calls do not reach every answer"


def test_each_number_of_each_architecture_has_its_answer() -> None:
    """Without arguments, all there are and those around the borders."""
    edges = [2**30, 2**31, 2**32 - 1]
    numbers = [*range(3000), *(n for edge in edges for n in (edge - 2, edge - 1, edge)), 2**30 + 39]
    for name in PROFILES:
        oracle, code = Oracle(name), compiled(name, TRACE)
        for arch in (X86_64, I386, 0x4000003E, 0xC00000B7):
            archs = np.full(len(numbers), arch, np.uint32)
            nothing = np.zeros((6, len(numbers)), np.uint64)
            differing(oracle, code, Calls(np.array(numbers, np.uint32), archs, nothing), TRACE)


def test_the_watching_filter_holds_forbidden_calls_only() -> None:
    oracle = Oracle("native")
    code = bpf.watch_filter(policy.load("native")).code
    numbers = np.array([*oracle.names, 999, 0x40000065, 0xFFFFFFFF], np.uint32)
    holds = [oracle.names.get(number) in oracle.forbidden for number in numbers.tolist()]
    nothing = np.zeros((6, len(numbers)), np.uint64)
    for arch in (X86_64, I386):
        got = simulate(code, Calls(numbers, np.full(len(numbers), arch, np.uint32), nothing))
        expected = [NOTIFY if arch == X86_64 and held else ALLOW for held in holds]
        assert got.tolist() == expected


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_allows_few_calls(name: str) -> None:
    assert len(policy.load(name).allow) == len(Oracle(name).allowed()) <= MOST_CALLS[name]


def test_a_launch_has_one_exec_and_python_none() -> None:
    execve = policy.syscalls()["execve"]
    assert len(policy.load("native").allow[execve]) == 1
    assert execve not in policy.load("python").allow


def test_wrong_policies_are_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("common", "x86_64"):
        (tmp_path / f"{name}.toml").write_text((policy.FOLDER / f"{name}.toml").read_text())
    monkeypatch.setattr(policy, "FOLDER", tmp_path)
    policy.load.cache_clear()
    cases = {
        "no system call": 'allow = ["reda"]\n[when]',
        "allowed and forbidden": 'allow = ["ptrace"]\n[when]',
        "can never equal": "allow = []\n[when]\nmmap = [[{ arg = 2, mask = 3, in = [4] }]]",
        "unknown placeholder": 'allow = []\n[when]\nmmap = [[{ arg = 2, in = ["uid"] }]]',
        "is not forbidden": 'allow = []\ntried = ["read"]\n[when]',
    }
    for complaint, text in cases.items():
        (tmp_path / "bad.toml").write_text(f"{text}\n")
        with pytest.raises(ValueError, match=complaint):
            policy.load("bad")
    with pytest.raises(ValueError, match="there is no policy"):
        policy.load("jit")
    policy.load.cache_clear()
