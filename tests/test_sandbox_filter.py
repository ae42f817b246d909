"""The compiled filters against an oracle that reads the policies on its own.

A BPF interpreter written here runs the filter; the expected answer comes from the TOML files
directly. Neither uses the compiler's code.
"""

from __future__ import annotations

import errno
import random
import struct
import tomllib
from typing import Any

import pytest

from piehost.host.sandbox import bpf, policy

ALLOW, ERRNO, TRACE, NOTIFY, KILL = 0x7FFF0000, 0x00050000, 0x7FF00000, 0x7FC00000, 0x80000000
X86_64, I386 = 0xC000003E, 0x40000003
PROFILES = ["native", "dynamic", "python", "perl", "node"]
AT_START = {"pid": 4711, "secret0": 0x1122334455667788, "secret1": 0x99AABBCCDDEEFF00, "secret2": 7}
MOST_CALLS = {"native": 41, "dynamic": 45, "python": 74, "perl": 49, "node": 66}


def read(name: str) -> dict[str, Any]:
    return tomllib.loads((policy.FOLDER / f"{name}.toml").read_text())


def interpret(code: bytes, data: bytes) -> int:
    """Runs classic BPF over a struct seccomp_data."""
    program = list(struct.iter_unpack("<HBBI", code))
    at = accumulator = 0
    while True:
        operation, if_true, if_false, value = program[at]
        at += 1
        if operation == 0x20:  # load a word
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif operation == 0x54:
            accumulator &= value
        elif operation == 0x15:
            at += if_true if accumulator == value else if_false
        elif operation == 0x35:
            at += if_true if accumulator >= value else if_false
        elif operation == 0x05:
            at += value
        elif operation == 0x06:
            return int(value)
        else:
            raise AssertionError(f"instruction {operation:#x}")


class Oracle:
    """What a policy says, straight from its files."""

    def __init__(self, name: str) -> None:
        self.numbers: dict[str, int] = read("x86_64")
        self.names = {number: call for call, number in self.numbers.items()}
        common = read("common")
        self.forbidden, self.absent = set(common["forbidden"]), set(common["absent"])
        self.plain: set[str] = set()
        self.when: dict[str, Any] = {}
        chain: list[dict[str, Any]] = []
        while name:
            chain.insert(0, read(name))
            name = chain[0].get("extends", "")
        for data in chain:
            self.plain |= set(data["allow"])
            self.when |= data["when"]
            tried = set(data.get("tried", []))
            self.forbidden -= tried
            self.absent |= tried

    def answer(self, arch: int, number: int, arguments: list[int], forbidden: int = KILL) -> int:
        if arch != X86_64 or 0x40000000 <= number < 0xFFFFFFFF:
            return KILL
        name = self.names.get(number)
        if name is None:
            return ERRNO | errno.ENOSYS
        if name in self.forbidden:
            return forbidden
        if name in self.when:
            if any(all(self.holds(c, arguments) for c in rule) for rule in self.when[name]):
                return ALLOW
        elif name in self.plain:
            return ALLOW
        return ERRNO | (errno.ENOSYS if name in self.absent else errno.EPERM)

    @staticmethod
    def holds(condition: dict[str, Any], arguments: list[int]) -> bool:
        value = arguments[condition["arg"]]
        if not condition.get("wide"):
            value &= 0xFFFFFFFF
        value &= condition.get("mask", 0xFFFFFFFFFFFFFFFF)
        return value in [AT_START.get(wanted, wanted) for wanted in condition["in"]]


def calls(oracle: Oracle, count: int) -> Any:
    """Random calls: half to calls with argument rules, their arguments near what the rules name."""
    rng = random.Random(20240601)
    interesting = [0, 1, 2, 3, 4, 5, 7, 17, *AT_START.values()]
    for rules in oracle.when.values():
        for condition in (c for rule in rules for c in rule):
            interesting += [AT_START.get(v, v) for v in condition["in"]]
            interesting.append(condition.get("mask", 0))
    when = [oracle.numbers[name] for name in oracle.when]
    numbers = [*oracle.names, 334, 336, 423, 470, 471, 1000, 0x3FFFFFFF, 0x40000000, 0x40000027]
    numbers += [0xFFFFFFFE, 0xFFFFFFFF, 0x80000000]

    def argument() -> int:
        value = rng.choice(interesting)
        kind = rng.randrange(8)
        if kind == 0:
            value ^= 1 << rng.randrange(64)
        elif kind == 1:
            value |= rng.getrandbits(32) << 32
        elif kind == 2:
            value = rng.getrandbits(64)
        elif kind == 3:
            value |= rng.choice(interesting)
        return value & 0xFFFFFFFFFFFFFFFF

    for name, rules in oracle.when.items():  # each rule fulfilled, and each bit of it flipped
        for rule in rules:
            exact = [argument() for _ in range(6)]
            for condition in rule:
                wanted = condition["in"][-1]
                exact[condition["arg"]] = AT_START.get(wanted, wanted)
            yield X86_64, oracle.numbers[name], exact
            for index in range(6):
                for bit in range(64):
                    flipped = list(exact)
                    flipped[index] ^= 1 << bit
                    yield X86_64, oracle.numbers[name], flipped
    for number in numbers:
        for arch in (X86_64, I386, 0x4000003E, 0xC00000B7):
            yield arch, number, [argument() for _ in range(6)]
    for _ in range(count):
        arch = X86_64 if rng.random() < 0.98 else rng.getrandbits(32)
        number = rng.choice(when) if rng.random() < 0.7 else rng.choice(numbers)
        yield arch, number, [argument() for _ in range(6)]


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("forbidden", [KILL, TRACE])
def test_a_filter_does_what_its_policy_says(name: str, forbidden: int) -> None:
    oracle = Oracle(name)
    compiled = bpf.compile_policy(policy.load(name), forbidden)
    code = bytearray(compiled.code)
    for placeholder, value in AT_START.items():
        compiled.fill(code, placeholder, value)
    answers: dict[int, int] = {}
    for arch, number, arguments in calls(oracle, 20_000):
        data = struct.pack("<IIQ6Q", number, arch, 0x400000, *arguments)
        got, expected = (
            interpret(bytes(code), data),
            oracle.answer(arch, number, arguments, forbidden),
        )
        assert got == expected, (
            oracle.names.get(number, number),
            hex(arch),
            [*map(hex, arguments)],
        )
        answers[got] = answers.get(got, 0) + 1
    assert min(answers.values()) > 100, "the calls do not reach every answer"
    assert set(answers) == {ALLOW, KILL, forbidden, ERRNO | errno.EPERM, ERRNO | errno.ENOSYS}


def test_the_watching_filter_holds_forbidden_calls_only() -> None:
    oracle = Oracle("native")
    code = bpf.watch_filter(policy.load("native")).code
    for number in [*oracle.names, 999, 0x40000065, 0xFFFFFFFF]:
        for arch in (X86_64, I386):
            got = interpret(code, struct.pack("<IIQ6Q", number, arch, 0, *[0] * 6))
            forbidden = arch == X86_64 and oracle.names.get(number) in oracle.forbidden
            assert got == (NOTIFY if forbidden else ALLOW)


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_allows_few_calls(name: str) -> None:
    assert len(policy.load(name).allow) <= MOST_CALLS[name]


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
        (tmp_path / "bad.toml").write_text(f'description = ""\n{text}\n')
        with pytest.raises(ValueError, match=complaint):
            policy.load("bad")
    with pytest.raises(ValueError, match="there is no policy"):
        policy.load("jit")
    policy.load.cache_clear()
