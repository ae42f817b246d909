"""The quotas there are, and how people write them. `allotment.py` makes limits of them.

A client checks with this file what it was given; it does not know the ABI.
"""

from __future__ import annotations

import re
from typing import Final

from msgspec import Struct

from .errors import Refused

Value = int | str

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_UNITS: Final = {"": 1, "k": 1000, "m": 10**6, "g": 10**9, "kib": KIB, "mib": MIB, "gib": GIB}
_NUMBER = re.compile(r"(\d{1,15})\s*([a-z]*)")


class Range(Struct, frozen=True):
    low: int
    high: int
    meaning: str


# Every quota by name: the values it may have, and what it means (shown in errors).
QUOTAS: Final[dict[str, Range]] = {
    "kv_pages": Range(1, 1 << 31, "KV pages held at once"),
    "embeds": Range(1, 1 << 24, "embeds held at once"),
    "tokens": Range(1, 1 << 24, "late-bound tokens held at once"),
    "commands": Range(1, 1 << 24, "commands queued and not yet run"),
    "top_k": Range(1, 1 << 24, "largest K of get_next_dist"),
    "ring_bytes": Range(4096, GIB, "size of ring out, in octets"),
    "ring_in_bytes": Range(4096, GIB, "size of ring in, in octets"),
    "history": Range(0, 1 << 24, "tokens held in histories"),
    "export_pages": Range(0, 1 << 31, "KV pages that the user's exports hold"),
    "children": Range(0, 1 << 12, "descendants of the launched inferlet alive at once"),
    "subscriptions": Range(0, 1 << 16, "subscriptions held at once"),
    "http_streams": Range(0, 1 << 10, "HTTP streams open at once"),
    "store_bytes": Range(0, 1 << 40, "keys and values of the user, in octets"),
    "egress_bytes": Range(0, 1 << 40, "bodies of its HTTP, its children's too, in octets"),
    "egress_seconds": Range(1, 86400, "time an HTTP request may take, in seconds"),
    "memory": Range(16 * MIB, 1 << 46, "address space, in octets"),
    "stack": Range(64 * KIB, GIB, "stack of the main thread, in octets"),
    "fds": Range(8, 1 << 16, "open files"),
    "file_size": Range(0, 1 << 40, "largest file it may write, in octets"),
    "cpu_seconds": Range(1, 1 << 31, "processor time, in seconds"),
    "wall_seconds": Range(1, 1 << 31, "time until it is ended, in seconds"),
    "output_bytes": Range(0, GIB, "octets kept of stdout, and of stderr"),
}


def parse_value(key: str, value: Value, where: str) -> int:
    """`value` (a number, or text such as "64MiB") of quota `key`. Refused says what is wrong."""
    known = QUOTAS.get(key)
    if known is None:
        raise Refused(
            f"there is no quota {key!r}",
            f"it is given in {where}",
            "one of " + ", ".join(QUOTAS),
            "bad_quota",
        )
    number = value if isinstance(value, int) and not isinstance(value, bool) else None
    if isinstance(value, str) and (match := _NUMBER.fullmatch(value.strip().lower())):
        unit = _UNITS.get(match[2])
        number = None if unit is None else int(match[1]) * unit
    if number is None or not known.low <= number <= known.high:
        raise Refused(
            f"quota {key} cannot be {value!r}",
            f"it is given in {where}, and means: {known.meaning}",
            f"a number from {known.low} to {known.high}, with k, M, G, KiB, MiB or GiB if you like",
            "bad_quota",
        )
    return number


def parse_options(options: tuple[str, ...]) -> dict[str, str]:
    """`key=value` of the command line, checked."""
    quotas: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise Refused(f"--quota {option} has no value", "", "--quota key=value", "bad_quota")
        parse_value(key, value, "--quota")
        quotas[key] = value
    return quotas
