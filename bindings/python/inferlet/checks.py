"""Arguments checked before they are sent: what is wrong with one is said here, by name, instead of
ending the inferlet as a bad frame. All raise ArgumentError unless they say else."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import SupportsFloat, SupportsIndex

from .abi import MAX_MESSAGE_BYTES, MAX_TOPIC_BYTES
from .errors import ArgumentError, PositionError

U32_MAX = 0xFFFFFFFF
_MAX_POSITION = 0x7FFFFFFF


def out_of_range(name: str, value: object, valid: str) -> ArgumentError:
    return ArgumentError(f"{name} is {value}, which is out of range", f"use {valid}")


def wrong_type(name: str, value: object, valid: str) -> ArgumentError:
    return ArgumentError(f"{name} is {value!r:.60}, of type {type(value).__name__}", f"use {valid}")


def number(name: str, value: SupportsFloat, valid: str) -> float:
    """`value` as a float; the caller looks at its range, which NaN is never in."""
    if isinstance(value, str | bytes):
        raise wrong_type(name, value, f"a number: {valid}")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong_type(name, value, f"a number: {valid}") from None


def integer(name: str, value: SupportsIndex, most: int, valid: str, least: int = 0) -> int:
    """`value` from `least` to `most`."""
    try:
        whole = operator.index(value)
    except TypeError:
        raise wrong_type(name, value, f"a whole number: {valid}") from None
    if not least <= whole <= most:
        raise out_of_range(name, whole, valid)
    return whole


def text(name: str, value: str, most: int, least: int = 0) -> str:
    """`value`, of `least` to `most` octets of UTF-8."""
    if not isinstance(value, str):
        raise wrong_type(name, value, "str")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise ArgumentError(f"{name} is no text: {error}", "use text without surrogates") from None
    if not least <= size <= most:
        raise ArgumentError(f"{name} has {size} octets", f"use {least} to {most:,} octets of UTF-8")
    return value


def name_of(what: str, value: str) -> str:
    """A topic, a key, the name of an export."""
    return text(what, value, MAX_TOPIC_BYTES, 1)


def octets(name: str, value: str | bytes | bytearray | memoryview) -> bytes:
    """`value` as bytes, a str in UTF-8."""
    if isinstance(value, str):
        return text(name, value, 1 << 62).encode()
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise wrong_type(name, value, "str or bytes")


def bounded(name: str, value: str | bytes, most: int, hint: str) -> bytes:
    """`octets`, at most `most` of them."""
    data = octets(name, value)
    if len(data) > most:
        raise ArgumentError(f"{name} has {len(data)} octets, it holds {most}", hint)
    return data


def message(value: str | bytes) -> bytes:
    """A message as sent."""
    return bounded("the message", value, MAX_MESSAGE_BYTES, "send it in parts")


def texts(name: str, values: Iterable[str], most: int, each: int) -> list[str]:
    """At most `most` texts of at most `each` octets; one text is not taken for its letters."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise wrong_type(name, values, "a list of str")
    listed = [text(f"one of {name}", value, each) for value in values]
    if len(listed) > most:
        raise out_of_range(f"the number of {name}", len(listed), f"at most {most}")
    return listed


def headers(values: Mapping[str, str], most: int, each: int) -> dict[str, str]:
    """Headers as sent."""
    if not isinstance(values, Mapping):
        raise wrong_type("headers", values, "a dict of str to str")
    if len(values) > most:
        raise out_of_range("the number of headers", len(values), f"at most {most}")
    return {
        text("the name of a header", key, each): text(f"header {key}", value, each)
        for key, value in values.items()
    }


def position(value: SupportsIndex) -> int:
    """A position as sent. PositionError if it is out of range."""
    try:
        where = operator.index(value)
    except TypeError:
        raise wrong_type("the position", value, "a whole number") from None
    if not 0 <= where <= _MAX_POSITION:
        raise PositionError(f"the position is {where}", "use 0 to the model's max_context - 1")
    return where


def positions(
    values: SupportsIndex | Iterable[SupportsIndex], count: int, what: str
) -> int | list[int]:
    """The position of the first of `count`, the others following it, or one for each of them.
    PositionError if one is out of range or their number is wrong."""
    if isinstance(values, int) or not isinstance(values, Iterable):
        first = position(values)
        if count > 1:
            position(first + count - 1)
        return first
    each = [position(value) for value in values]
    if len(each) != count:
        raise PositionError(
            f"there are {len(each)} positions for {count} {what}",
            "give one for each, or only the first",
        )
    return each
