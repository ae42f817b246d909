"""A policy: what an inferlet may ask of the kernel, read from `policies/*.toml`.

Only data. `bpf.py` makes a filter of it; the tests evaluate the same files on their own.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeAlias

from msgspec import Struct

FOLDER: Final = Path(__file__).parent / "policies"
U32: Final = 0xFFFFFFFF
U64: Final = 0xFFFFFFFFFFFFFFFF

# known only when an inferlet starts: its process id, and the secret of its one exec
PLACEHOLDERS: Final = frozenset({"pid", "secret0", "secret1", "secret2"})


class Condition(Struct, frozen=True):
    """Bits `mask` of argument `arg` equal `value`, a number or a placeholder's name."""

    arg: int
    mask: int
    value: int | str
    wide: bool  # compares 64 bits; else the low 32, as the kernel does with an int


Alternative: TypeAlias = tuple[Condition, ...]  # all must hold


class Policy(Struct, frozen=True):
    """Every number in `allow` may be called if one of its alternatives holds.

    `()` as an alternative holds always; no alternative at all means never.
    """

    allow: dict[int, tuple[Alternative, ...]]
    forbidden: frozenset[int]  # kill the process
    absent: frozenset[int]  # ENOSYS, where not allowed


@cache
def syscalls() -> dict[str, int]:
    """The number of every system call of x86_64, by name."""
    return {name: int(number) for name, number in _read("x86_64").items()}


@cache
def syscall_name(number: int) -> str:
    return next((n for n, k in syscalls().items() if k == number), f"system call {number}")


@cache
def load(name: str) -> Policy:
    """The policy of `policies/<name>.toml`. ValueError if there is none or it is wrong."""
    if not (FOLDER / f"{name}.toml").is_file() or name in ("common", "x86_64"):
        raise ValueError(f"there is no policy {name!r}")
    common = _read("common")
    rules = _rules(name)
    allow: dict[int, tuple[Alternative, ...]] = {_number(call): ((),) for call in rules["allow"]}
    for call, alternatives in rules["when"].items():
        allow[_number(call)] = tuple(
            chosen for alternative in alternatives for chosen in _expand(alternative)
        )
    allow = {number: alternatives for number, alternatives in allow.items() if alternatives}
    forbidden = frozenset(map(_number, common["forbidden"]))
    tried = frozenset(map(_number, rules["tried"]))
    if tried - forbidden:
        raise ValueError(f"policy {name}: {syscall_name(min(tried - forbidden))} is not forbidden")
    if clash := forbidden & allow.keys():
        raise ValueError(f"policy {name}: {syscall_name(min(clash))} is both allowed and forbidden")
    absent = frozenset(map(_number, common["absent"])) | tried
    return Policy(allow, forbidden - tried, absent)


def _rules(name: str) -> dict[str, Any]:
    """The policy's own tables upon those of the policy it extends."""
    rules = {"tried": [], **_read(name)}
    if base := rules.get("extends"):
        below = _rules(base)
        rules["allow"] = below["allow"] + rules["allow"]
        rules["when"] = below["when"] | rules["when"]
        rules["tried"] = below["tried"] + rules["tried"]
    return rules


def _expand(conditions: list[dict[str, Any]]) -> list[Alternative]:
    """One alternative per combination of the values in `in`."""
    combinations: list[Alternative] = [()]
    for condition in conditions:
        wide = condition.get("wide", False)
        width = U64 if wide else U32
        mask = condition.get("mask", width)
        for value in condition["in"]:
            if isinstance(value, str) and value not in PLACEHOLDERS:
                raise ValueError(f"unknown placeholder {value!r}")
            if isinstance(value, int) and (value & mask != value or mask > width):
                raise ValueError(f"argument {condition['arg']} can never equal {value:#x}")
        combinations = [
            (*done, Condition(condition["arg"], mask, value, wide))
            for done in combinations
            for value in condition["in"]
        ]
    return combinations


def _number(call: str) -> int:
    if call not in syscalls():
        raise ValueError(f"x86_64 has no system call {call!r}")
    return syscalls()[call]


def _read(name: str) -> dict[str, Any]:
    with (FOLDER / f"{name}.toml").open("rb") as file:
        return tomllib.load(file)
