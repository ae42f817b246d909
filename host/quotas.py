"""The quotas there are, and how people write them. `allotment.py` makes limits of them.

A client checks with this file what it was given; it does not know the ABI.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from msgspec import Struct

from .errors import BadUsage, Refused

Value = int | str

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
NONE: Final = "none"  # no cap, where that is possible
_UNITS: Final = {"": 1, "k": 1000, "m": 10**6, "g": 10**9, "kib": KIB, "mib": MIB, "gib": GIB}
_NUMBER = re.compile(r"(-?\d{1,15})\s*([a-z]*|%)")
_EVER: Final = 1 << 31
_MOST_SHOWN: Final = 80  # characters of a wrong value

# What happens to who passes a quota.
FAILS: Final = "the call fails"
SLOWS: Final = "it is slowed"
ENDS: Final = "it is ended"
CUT: Final = "the rest is dropped"
NOTHING: Final = "-"

_RINGS: Final = "the rings are memory that was mapped when it started"
_STACK: Final = "the kernel laid its stack out when it started"


class Range(Struct, frozen=True):
    low: int
    high: int
    meaning: str
    beyond: str
    may_be_none: bool = False
    fixed: str = ""  # why it stays as it is while the inferlet runs; empty: it can be changed


# Every quota by name: the values it may have, what it means, and what comes of passing it.
QUOTAS: Final[dict[str, Range]] = {
    "kv_pages": Range(1, _EVER, "KV pages held at once", FAILS),
    "embeds": Range(1, 1 << 24, "embeds held at once", FAILS),
    "tokens": Range(1, 1 << 24, "late-bound tokens held at once", FAILS),
    "commands": Range(1, 1 << 24, "commands queued and not yet run", FAILS),
    "top_k": Range(1, 1 << 24, "largest K of get_next_dist", FAILS),
    "ring_bytes": Range(4096, GIB, "size of ring out, in octets", FAILS, fixed=_RINGS),
    "ring_in_bytes": Range(4096, GIB, "size of ring in, in octets", FAILS, fixed=_RINGS),
    "history": Range(0, 1 << 24, "tokens held in histories", FAILS),
    "export_pages": Range(0, _EVER, "KV pages that the user's exports hold", FAILS),
    "children": Range(0, 1 << 12, "descendants of the launched inferlet alive at once", FAILS),
    "subscriptions": Range(0, 1 << 16, "subscriptions held at once", FAILS),
    "http_streams": Range(0, 1 << 10, "HTTP streams open at once", FAILS),
    "store_bytes": Range(0, 1 << 40, "keys and values of the user, in octets", FAILS),
    "egress_bytes": Range(0, 1 << 40, "bodies of its HTTP, its children's too, in octets", FAILS),
    "egress_seconds": Range(1, 86400, "time an HTTP request may take, in seconds", FAILS),
    "tokens_per_second": Range(1, _EVER, "inputs of forward passes a second", SLOWS, True),
    "commands_per_second": Range(1, _EVER, "commands a second", SLOWS, True),
    "share": Range(1, 10000, "its user's weight against other users' on the accelerator", NOTHING),
    "priority": Range(-100, 100, "rank among the same user's inferlets; higher first", NOTHING),
    "cpu": Range(1, 409600, "processors, in percent of one core", SLOWS, True),
    "cpu_seconds": Range(1, _EVER, "processor time, in seconds", ENDS, True),
    "wall_seconds": Range(1, _EVER, "time from its launch on, in seconds", ENDS, True),
    "memory": Range(4 * MIB, 1 << 46, "resident memory, in octets", ENDS),
    "address_space": Range(16 * MIB, 1 << 46, "address space, in octets", FAILS),
    "stack": Range(64 * KIB, GIB, "stack of the main thread, in octets", ENDS, fixed=_STACK),
    "threads": Range(1, 32768, "processes and threads", FAILS),
    "fds": Range(8, 1 << 16, "open files", FAILS),
    "file_size": Range(0, 1 << 40, "largest file it may write, in octets", FAILS),
    "output_bytes": Range(0, GIB, "octets kept of stdout, and of stderr", CUT),
}


def parse_value(key: str, value: Value, where: str) -> int | None:
    """`value` (a number, or text such as "64MiB") of quota `key`; None: no cap. Refused says what
    is wrong."""
    known = QUOTAS.get(key)
    if known is None:
        raise Refused(
            f"there is no quota {key!r}",
            f"it is given in {where}",
            "one of " + ", ".join(QUOTAS),
            "bad_quota",
        )
    if known.may_be_none and isinstance(value, str) and value.strip().lower() == NONE:
        return None
    number = value if isinstance(value, int) and not isinstance(value, bool) else None
    if isinstance(value, str) and (match := _NUMBER.fullmatch(value.strip().lower())):
        units = {"": 1, "%": 1} if key == "cpu" else _UNITS
        unit = units.get(match[2])
        number = None if unit is None else int(match[1]) * unit
    if number is None or not known.low <= number <= known.high:
        raise Refused(
            f"quota {key} cannot be {_shown(value)}",
            f"it is given in {where}, and means: {known.meaning}",
            _possible(key, known),
            "bad_quota",
        )
    return number


def _shown(value: Value) -> str:
    """Python does not write out an integer of some thousand digits, which TOML may hold in hex."""
    if isinstance(value, int) and value.bit_length() > 64:
        return "a number of more than 64 bits"
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _possible(key: str, known: Range) -> str:
    units = "with a % if you like" if key == "cpu" else "with k, M, G, KiB, MiB or GiB if you like"
    none = f"; or {NONE}" if known.may_be_none else ""
    return f"a number from {known.low} to {known.high}, {units}{none}"


def parse_options(options: Iterable[str], where: str = "--quota") -> dict[str, str]:
    """`key=value` of the command line, checked. BadUsage says what is wrong."""
    quotas: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise BadUsage(f"{where} {option} has no value", "", f"{where} key=value", "bad_quota")
        try:
            parse_value(key, value, where)
        except Refused as refused:
            reason = refused.reason
            raise BadUsage(reason.what, reason.why, reason.hint, reason.code) from None
        quotas[key] = value
    return quotas


def exceeds(number: int | None, ceiling: int | None) -> bool:
    """Whether a cap of `number` is wider than one of `ceiling`. None is no cap."""
    return ceiling is not None and (number is None or number > ceiling)


def as_text(key: str, number: int | None) -> str:
    """As people write it, and `parse_value` reads it."""
    if number is None:
        return NONE
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if is_octets(key) and number and number % size == 0:
            return f"{number // size}{unit}"
    return f"{number}%" if key == "cpu" else str(number)


def is_octets(key: str) -> bool:
    return "octets" in QUOTAS[key].meaning
