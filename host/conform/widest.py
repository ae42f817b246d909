"""msgpack in its longest forms: 64-bit integers, 32-bit lengths. Valid, if nobody's habit.

https://github.com/msgpack/msgpack/blob/master/spec.md
"""

from __future__ import annotations

import struct
from typing import Any, Final

HEADER: Final = 5  # octets before the elements of an array


def array(encoded: list[bytes]) -> bytes:
    """An array 32 of values that are encoded already."""
    return struct.pack(">BI", 0xDD, len(encoded)) + b"".join(encoded)


def encode(value: Any) -> bytes:
    """`value`, of the types that the ABI has; a float that is whole as an integer."""
    match value:
        case None:
            return b"\xc0"
        case bool():
            return b"\xc3" if value else b"\xc2"
        case float() if not value.is_integer() or abs(value) >= 2**63:
            return struct.pack(">Bd", 0xCB, value)
        case int() | float():
            number = int(value)
            return (
                struct.pack(">BQ", 0xCF, number)
                if number >= 0
                else struct.pack(">Bq", 0xD3, number)
            )
        case str():
            octets = value.encode()
            return struct.pack(">BI", 0xDB, len(octets)) + octets
        case bytes():
            return struct.pack(">BI", 0xC6, len(value)) + value
        case list():
            return array([encode(item) for item in value])
        case dict():
            pairs = b"".join(encode(key) + encode(item) for key, item in value.items())
            return struct.pack(">BI", 0xDF, len(value)) + pairs
    raise TypeError(f"the ABI has no {type(value).__name__}")
