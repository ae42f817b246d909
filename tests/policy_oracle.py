"""What a policy says, read from its TOML files directly, and a simulator of the filters.

Neither uses the code of the compiler or of `policy.py`. Both take many calls at once, as arrays: a
test that took millions of them one by one would not be run.
"""

from __future__ import annotations

import errno
import itertools
import struct
import tomllib
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from piehost.host.sandbox.policy import FOLDER

PROFILES = ["native", "dynamic", "python", "perl", "node"]
ALLOW, ERRNO, TRACE, NOTIFY, KILL = 0x7FFF0000, 0x00050000, 0x7FF00000, 0x7FC00000, 0x80000000
EPERM, ENOSYS = ERRNO | errno.EPERM, ERRNO | errno.ENOSYS
X86_64, I386, X32_BIT, U32 = 0xC000003E, 0x40000003, 0x40000000, 0xFFFFFFFF
AT_START = {"pid": 4711, "secret0": 0x1122334455667788, "secret1": 0x99AABBCCDDEEFF00, "secret2": 7}

U32s: TypeAlias = npt.NDArray[np.uint32]
U64s: TypeAlias = npt.NDArray[np.uint64]


class Calls(NamedTuple):
    """System calls: numbers and architectures [calls], arguments [6, calls]."""

    numbers: U32s
    archs: U32s
    arguments: U64s


class Fulfilled(NamedTuple):
    """A call that one alternative of a rule allows. Arguments that it does not name are zero."""

    name: str
    arguments: tuple[int, ...]
    named: tuple[int, ...]  # which arguments the alternative looks at


def read(name: str) -> dict[str, Any]:
    return tomllib.loads((FOLDER / f"{name}.toml").read_text())


class Oracle:
    """What a policy says. `at_start`: what its placeholders stand for."""

    def __init__(self, name: str, at_start: dict[str, int] | None = None) -> None:
        self.at_start = AT_START if at_start is None else at_start
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

    def allowed(self) -> set[str]:
        """Calls that are allowed with some arguments at least."""
        return self.plain - self.when.keys() | {name for name, rules in self.when.items() if rules}

    def answers(self, calls: Calls, forbidden: int = KILL) -> U32s:
        """What the kernel is to be told for each."""
        known = np.full(max(self.names) + 2, ENOSYS, np.uint32)
        for name, number in self.numbers.items():
            if name in self.forbidden:
                known[number] = forbidden
            elif name in self.plain and name not in self.when:
                known[number] = ALLOW
            else:
                known[number] = self.refusal(name)
        answers = known[np.minimum(calls.numbers, len(known) - 1)]
        for name, rules in self.when.items():
            if name not in self.forbidden:
                here = np.flatnonzero(calls.numbers == self.numbers[name])
                answers[here[self.holds(rules, calls.arguments[:, here])]] = ALLOW
        x32 = (calls.numbers >= X32_BIT) & (calls.numbers != U32)
        answers[x32 | (calls.archs != X86_64)] = KILL
        return answers

    def refusal(self, name: str) -> int:
        return ENOSYS if name in self.absent else EPERM

    def holds(self, rules: list[list[dict[str, Any]]], arguments: U64s) -> npt.NDArray[np.bool_]:
        one_of_them = np.zeros(arguments.shape[1], bool)
        for rule in rules:
            all_of_it = np.ones(arguments.shape[1], bool)
            for condition in rule:
                bits = condition.get("mask", 0xFFFFFFFFFFFFFFFF)
                if not condition.get("wide"):
                    bits &= U32
                value = arguments[condition["arg"]] & np.uint64(bits)
                all_of_it &= np.isin(value, np.array(self.values(condition), np.uint64))
            one_of_them |= all_of_it
        return one_of_them

    def values(self, condition: dict[str, Any]) -> list[int]:
        return [self.at_start.get(wanted, wanted) for wanted in condition["in"]]

    def fulfilled(self) -> Iterator[Fulfilled]:
        """Each alternative of each rule, with each combination of the values it lists."""
        for name, rules in self.when.items():
            for rule in rules:
                named = tuple(condition["arg"] for condition in rule)
                for values in itertools.product(*map(self.values, rule)):
                    arguments = [0] * 6
                    for argument, value in zip(named, values, strict=True):
                        arguments[argument] |= value
                    yield Fulfilled(name, tuple(arguments), named)


def simulate(code: bytes, calls: Calls) -> U32s:
    """Runs classic BPF over the struct seccomp_data of each call. A jump goes forward only, so one
    pass over the program is enough; each instruction runs for the calls that have come to it."""
    program = list(struct.iter_unpack("<HBBI", code))
    count = len(calls.numbers)
    data = np.zeros((16, count), np.uint32)  # the instruction pointer is zero
    data[0], data[1] = calls.numbers, calls.archs
    data[4::2] = calls.arguments & np.uint64(U32)
    data[5::2] = calls.arguments >> np.uint64(32)
    accumulator, answers = np.zeros(count, np.uint32), np.zeros(count, np.uint32)
    coming: list[list[npt.NDArray[np.int64]]] = [[] for _ in program]
    coming[0].append(np.arange(count))
    for at, (operation, if_true, if_false, value) in enumerate(program):
        if not coming[at]:
            continue
        here = np.concatenate(coming[at])
        if operation == 0x06:
            answers[here] = value
            continue
        if operation == 0x20:  # load a word
            accumulator[here] = data[value // 4, here]
            coming[at + 1].append(here)
        elif operation == 0x54:
            accumulator[here] &= np.uint32(value)
            coming[at + 1].append(here)
        elif operation == 0x05:
            coming[at + 1 + value].append(here)
        elif operation in (0x15, 0x35):
            now = accumulator[here]
            jumps = now == value if operation == 0x15 else now >= value
            coming[at + 1 + if_true].append(here[jumps])
            coming[at + 1 + if_false].append(here[~jumps])
        else:
            raise AssertionError(f"instruction {operation:#x}")
    return answers


def flipped(oracle: Oracle) -> Calls:
    """Each fulfilled rule, and each bit of each argument of it flipped alone."""
    exact = np.array([rule.arguments for rule in oracle.fulfilled()], np.uint64)  # [rules, 6]
    numbers = [oracle.numbers[rule.name] for rule in oracle.fulfilled()]
    flips = np.zeros((1 + 6 * 64, 6), np.uint64)
    for index in range(6 * 64):
        flips[1 + index, index // 64] = 1 << index % 64
    arguments = (exact[:, None, :] ^ flips).reshape(-1, 6).T
    repeated = np.repeat(np.array(numbers, np.uint32), len(flips))
    return Calls(repeated, np.full(len(repeated), X86_64, np.uint32), arguments)


def random_calls(oracle: Oracle, count: int, rng: np.random.Generator) -> Calls:
    """Half near what the rules allow, half anywhere; two of a hundred of another architecture."""
    rules = list(oracle.fulfilled())
    numbers = np.array(
        [
            *[*oracle.names, 336, 423, 470, 471, 1000, 0x3FFFFFFF, 0x40000000, 0x40000027],
            *[0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF],
        ],
        np.uint32,
    )
    masks = [c.get("mask", 0) for r in oracle.when.values() for rule in r for c in rule]
    values = [value for rule in rules for value in rule.arguments]
    interesting = np.unique(np.array([*range(20), *values, *masks], np.uint64))

    chosen = rng.integers(len(rules), size=count)
    anywhere = rng.random(count) < 0.5
    number = np.array([oracle.numbers[rule.name] for rule in rules], np.uint32)[chosen]
    elsewhere = anywhere & (rng.random(count) < 0.5)
    number[elsewhere] = rng.choice(numbers, int(elsewhere.sum()))
    arguments = np.array([rule.arguments for rule in rules], np.uint64)[chosen].T.copy()
    arguments[:, anywhere] = rng.choice(interesting, (6, int(anywhere.sum())))

    kind = rng.integers(32, size=(6, count))
    random = rng.integers(0, 1 << 64, size=(6, count), dtype=np.uint64)
    bit = np.uint64(1) << random % np.uint64(64)
    arguments ^= np.where(kind == 0, bit, np.uint64(0))
    arguments |= np.where(kind == 1, random << np.uint64(32), np.uint64(0))
    arguments |= np.where(kind == 2, rng.choice(interesting, (6, count)), np.uint64(0))
    arguments = np.where(kind == 3, random, arguments)

    archs = np.full(count, X86_64, np.uint32)
    foreign = rng.random(count) < 0.02
    others = np.array([I386, 0x4000003E, 0xC00000B7, 0], np.uint32)
    archs[foreign] = rng.choice(others, int(foreign.sum()))
    return Calls(number, archs, arguments)
