"""Makes seccomp filters (classic BPF) of policies.

Not libseccomp: it has one answer for whatever does not match, while a policy needs EPERM for a
wrong argument, ENOSYS for a second exec and for numbers that do not exist; it miscompiles some
pairs of 64-bit comparisons; and patch points would have to be searched for. What is needed is
small: a binary search over the number, then equality tests. The tests run every filter against an
oracle.
"""

from __future__ import annotations

import errno
import struct
from typing import Final

from msgspec import Struct

from .policy import U32, U64, Alternative, Condition, Policy, syscalls

ALLOW: Final = 0x7FFF0000
TRACE: Final = 0x7FF00000  # without a tracer: ENOSYS
NOTIFY: Final = 0x7FC00000
ERRNO: Final = 0x00050000
KILL: Final = 0x80000000
EPERM: Final = ERRNO | errno.EPERM
ENOSYS: Final = ERRNO | errno.ENOSYS

ARCH_X86_64: Final = 0xC000003E
X32_BIT: Final = 0x40000000

# struct seccomp_data: int nr; u32 arch; u64 instruction_pointer; u64 args[6]
_NR, _ARCH, _ARGS = 0, 4, 16
# linux/bpf_common.h
_LOAD, _AND, _JEQ, _JGE, _JA, _RET = 0x20, 0x54, 0x15, 0x35, 0x05, 0x06
_INSTRUCTION = struct.Struct("<HBBI")


class _Op(Struct):
    """One instruction; `value` may be a placeholder's name and half (0 low, 1 high)."""

    code: int
    value: int | tuple[str, int]
    if_true: int = 0
    if_false: int = 0


class Filter(Struct, frozen=True):
    """A compiled filter and where the numbers of one launch go into it."""

    code: bytes
    slots: dict[str, list[tuple[int, int]]]  # placeholder -> (byte offset, shift of its half)

    def offsets(self, name: str) -> list[int]:
        """Where the low half of a placeholder goes."""
        return [offset for offset, shift in self.slots.get(name, ()) if not shift]

    def fill(self, code: bytearray | memoryview, name: str, value: int) -> None:
        """Writes a placeholder's value into `code`, a copy of `self.code`."""
        for offset, shift in self.slots.get(name, ()):
            struct.pack_into("<I", code, offset, (value >> shift) & U32)


def compile_policy(policy: Policy, forbidden: int = KILL) -> Filter:
    """The filter of `policy`; `forbidden` is what forbidden calls do: KILL, or TRACE under a
    watching filter (`watch_filter`) of the parent's."""
    leaves: dict[int, list[_Op]] = {}
    for number in syscalls().values():
        refusal = ENOSYS if number in policy.absent else EPERM
        if number in policy.forbidden:
            leaves[number] = [_Op(_RET, forbidden)]
        elif number in policy.allow:
            leaves[number] = _leaf(policy.allow[number], refusal)
        else:
            leaves[number] = [_Op(_RET, refusal)]
    return _assemble(leaves, unknown=ENOSYS, foreign=KILL)


def watch_filter(policy: Policy, passage: int | None = None) -> Filter:
    """A filter that hands the policy's forbidden calls to a listener and leaves all others be, also
    those whose sixth argument is `passage`: the launcher's own, as it sets a child up."""
    exempt = () if passage is None else ((Condition(5, U64, passage, wide=True),),)
    leaves = {number: _leaf(exempt, NOTIFY) for number in policy.forbidden}
    return _assemble(leaves, unknown=ALLOW, foreign=ALLOW)


def _leaf(alternatives: tuple[Alternative, ...], refusal: int) -> list[_Op]:
    """Tries one alternative after the other."""
    ops: list[_Op] = []
    for alternative in alternatives:
        tests: list[_Op] = []
        for condition in alternative:
            for half in (1, 0) if condition.wide else (0,):
                mask = condition.mask >> (32 * half) & U32
                tests.append(_Op(_LOAD, _ARGS + 8 * condition.arg + 4 * half))
                if mask != U32:
                    tests.append(_Op(_AND, mask))
                value = condition.value
                wanted = (value, half) if isinstance(value, str) else value >> (32 * half) & U32
                tests.append(_Op(_JEQ, wanted))
        for at, op in enumerate(tests):
            if op.code == _JEQ:
                op.if_false = len(tests) - at  # past the RET below, to the next alternative
        ops += [*tests, _Op(_RET, ALLOW)]
        if not tests:
            return ops
    return [*ops, _Op(_RET, refusal)]


def _assemble(leaves: dict[int, list[_Op]], unknown: int, foreign: int) -> Filter:
    """Architecture check, then binary search over ranges of numbers with the same answer."""
    ranges: list[tuple[int, list[_Op]]] = []  # (first number, what to do from there on)

    def add(first: int, leaf: list[_Op]) -> None:
        if not ranges or ranges[-1][1] != leaf:
            ranges.append((first, leaf))

    for number in range(max(leaves) + 1):
        add(number, leaves.get(number, [_Op(_RET, unknown)]))
    add(max(leaves) + 1, [_Op(_RET, unknown)])
    add(X32_BIT, [_Op(_RET, foreign)])
    add(U32, [_Op(_RET, unknown)])  # -1: not x32, just no system call
    ops = [
        _Op(_LOAD, _ARCH),
        _Op(_JEQ, ARCH_X86_64, if_true=1),
        _Op(_RET, foreign),
        _Op(_LOAD, _NR),
        *_search(ranges),
    ]
    code, slots = bytearray(), dict[str, list[tuple[int, int]]]()
    for op in ops:
        value = op.value
        if isinstance(value, tuple):
            name, half = value
            slots.setdefault(name, []).append((len(code) + 4, 32 * half))
            value = 0
        code += _INSTRUCTION.pack(op.code, op.if_true, op.if_false, value)
    return Filter(bytes(code), slots)


def _search(ranges: list[tuple[int, list[_Op]]]) -> list[_Op]:
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    left, right = _search(ranges[:middle]), _search(ranges[middle:])
    # a conditional jump reaches 255 instructions, an unconditional one everything
    return [_Op(_JGE, ranges[middle][0], if_false=1), _Op(_JA, len(left)), *left, *right]
