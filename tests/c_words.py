"""The lines that `bindings/c/tests/driver.c` reads: commands as words, a call for each answer."""

from __future__ import annotations

from typing import Any

from .c_driver import hexed

# fields of a command (from 0, after the request id) that are arrays or maps: the driver wants
# their length before them
COUNTED = {
    16: [2, 3],
    17: [2, 5],
    19: [8, 11],
    31: [2],
    32: [3],
    36: [2],
    42: [2],
    47: [3],
    48: [2],
    49: [2],
    51: [1],
}
POSITIONS = {16: 3, 47: 3}  # the field that is an array of positions or the first of them

# a call whose answer is of the kind
ASK = {
    "number": "18 1 1 0 1 0",
    "bytes": "2",
    "tokens": "20 0 78 1",
    "sampled": "19 1 1 0 1 0 0 1 0 nil 0 0 nil 0 nil 1 0 0 1 5 0",
    "quotas": "21",
    "message": "25 1",
    "bool": "29 6b",
    "names": "30 - -",
    "response": "31 1 75 0",
    "text": "36 1 - 0",
    "imported": "44 1 1 6e",
    "exports": "45 - -",
}


def words(value: Any, counted: bool = False) -> list[str]:
    """What the driver reads for a field of a command."""
    if value is None:
        return ["nil"]
    if isinstance(value, bool):
        return [str(int(value))]
    if isinstance(value, str):
        return [hexed(value.encode())]
    if isinstance(value, dict):
        if "hex" in value:
            return [value["hex"] or "-"]
        if "role" in value:  # a message of a chat
            return [hexed(value[key].encode()) for key in ("role", "content")]
        value = list(value.items())
    if isinstance(value, list | tuple):
        flat = [w for item in value for w in words(item)]
        return [str(len(value)), *flat] if counted else flat
    return [repr(value)]


def call(command: list[Any]) -> str:
    """The driver's line for a command of the vectors."""
    op, request, *fields = command
    counted = COUNTED.get(op, [])
    parts = [words(f, counted=i in counted) for i, f in enumerate(fields)]
    if op in POSITIONS:
        at = POSITIONS[op]
        each = isinstance(fields[at], list)
        parts[at] = ["at", *parts[at]] if each else ["from", *words(fields[at])]
    line = " ".join([str(op), *(w for part in parts for w in part)])
    return line if request is None else f"@{request} {line}"
