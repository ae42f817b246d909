"""Tells whether two commands mean the same, and in words where they do not.

Handles, request ids and places in the rings are names that an inferlet chooses. So a handle is the
same as another if the same command made both; request ids are the same if both want an answer;
places in ring out always, and places in ring in if the same octets lie there.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

import msgspec
from inferlet import abi
from inferlet.abi import AnyCommand, Command
from msgspec import Struct

from .handles import MAKES, kind_of
from .ring_places import RingPlaces

_SHOWN_ITEMS: Final = 8
_SHOWN_OCTETS: Final = 60
_BEFORE: Final = 20  # octets or characters shown before the first that differs

_INSIDE: Final = "inside the ring"

Sequence: TypeAlias = bytes | str | list[Any]


class Made(Struct, frozen=True):
    """What a handle stands for: something that the command with this number made; 0: nothing."""

    number: int

    def __str__(self) -> str:
        return f"made by command {self.number}" if self.number else "never made"


class Side:
    """What is known of one of the two programs: which command made each handle."""

    def __init__(self, places: RingPlaces) -> None:
        self._places = places
        self._made: dict[tuple[str, int], int] = {}  # by kind and handle, the command's number

    def meaning(self, command: AnyCommand, ring_in: bytes | None) -> dict[str, Any]:
        """The fields of `command` with nothing left in them that the program merely chose.
        `ring_in`: what it refers to there."""
        fields = {name: getattr(command, name) for name in command.__struct_fields__}
        made = MAKES.get(type(command))
        for name, value in fields.items():
            kind = kind_of(type(command), name)
            if name == "req":
                fields[name] = value is not None
            elif name == made:
                fields[name] = None
            elif kind and value is not None:
                fields[name] = self._handles(kind, value)
        if self._places.out(command) is not None:
            fields["offset"] = _INSIDE
        if ring_in is not None:
            fields["mask" if isinstance(command, abi.Sample) else "offset"] = ring_in
        return fields

    def done(self, number: int, command: AnyCommand) -> None:
        """`command` was the one with this number: what it makes is known from now on."""
        name = MAKES.get(type(command))
        if name is not None:
            self._made[name, getattr(command, name)] = number

    def _handles(self, kind: str, value: Any) -> Any:
        if isinstance(value, int):
            return self._maker(kind, value)
        if isinstance(value, tuple):  # a span, an index: its first item is the handle
            return (self._maker(kind, value[0]), *value[1:])
        if kind == "token":  # refs: ids, and handles as their bitwise complement
            return [ref if ref >= 0 else self._maker(kind, ~ref) for ref in value]
        return [self._handles(kind, item) for item in value]

    def _maker(self, kind: str, handle: int) -> Made:
        return Made(self._made.get((kind, handle), 0))


class Differences(Struct):
    """Between a recorded command and the one that came: what each is, and which fields differ."""

    recorded: str
    came: str
    fields: list[str]


def differences(
    recorded: AnyCommand,
    came: AnyCommand,
    recorded_means: dict[str, Any],
    came_means: dict[str, Any],
) -> Differences | None:
    """None if they mean the same."""
    fields = []
    if type(recorded) is type(came):
        for name, meant in recorded_means.items():
            if not _same(meant, came_means[name]):
                fields.append(_field(name, meant, came_means[name]))
        if not fields:
            return None
    return Differences(describe(recorded), describe(came), fields)


def _same(one: Any, other: Any) -> bool:
    """NaN is the same as NaN."""
    return bool(one == other) or msgspec.msgpack.encode(one) == msgspec.msgpack.encode(other)


def _field(name: str, recorded: Any, came: Any) -> str:
    """How the meanings of a field differ."""
    if name == "req":
        return f"an answer is wanted: recorded {recorded}, came {came}"
    if _INSIDE in (recorded, came):
        return f"{name}: recorded {recorded}, came {came}: one does not fit into the ring"
    where = f"the octets in ring in at {name}" if name in ("mask", "offset") else name
    if isinstance(recorded, bytes | str | list) and type(recorded) is type(came):
        return f"{where}: {_place(recorded, came)}"
    return f"{where}: recorded {_shown(recorded)}, came {_shown(came)}"


def _place(recorded: Sequence, came: Sequence) -> str:
    """Where two sequences differ first, with what is there."""
    at = next(
        (i for i, (one, other) in enumerate(zip(recorded, came, strict=False)) if one != other),
        min(len(recorded), len(came)),
    )
    unit = {bytes: "octet", str: "character"}.get(type(recorded), "item")
    return f"{unit} {at}: recorded {_around(recorded, at)}, came {_around(came, at)}"


def _around(value: Sequence, at: int) -> str:
    if isinstance(value, list):
        return _shown(value[at]) if at < len(value) else f"the end ({len(value)} items)"
    first = max(0, at - _BEFORE) if len(value) > _SHOWN_OCTETS else 0
    part = value[first : first + _SHOWN_OCTETS]
    before = "…" if first else ""
    after = "…" if first + len(part) < len(value) else ""
    return f"{before}{part!r}{after}"


def describe(command: AnyCommand) -> str:
    """`name(field=value, ...)`, without the fields that have their default; long ones are cut."""
    defaults = dict(
        zip(
            reversed(command.__struct_fields__),
            reversed(command.__struct_defaults__),
            strict=False,
        )
    )
    parts = []
    for name in command.__struct_fields__[1:]:  # the first is the request id
        value = getattr(command, name)
        if name not in defaults or not _is_default(value, defaults[name]):
            parts.append(f"{name}={_shown(value)}")
    return f"{command_name(type(command))}({', '.join(parts)})"


def _is_default(value: Any, default: Any) -> bool:
    factory: Callable[[], Any] | None = getattr(default, "factory", None)
    return bool(value == (factory() if factory is not None else default))


def command_name(kind: type[Command]) -> str:
    """As docs/abi.md calls it."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower().replace("kv_page", "kvpage")


def _shown(value: Any) -> str:
    if isinstance(value, bytes | str):
        more = f"… ({len(value)} in all)" if len(value) > _SHOWN_OCTETS else ""
        return repr(value[:_SHOWN_OCTETS]) + more
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    if isinstance(value, list):
        return f"[{_items(map(_shown, value), len(value))}]"
    if isinstance(value, dict):
        pairs = (f"{_shown(key)}: {_shown(item)}" for key, item in value.items())
        return f"{{{_items(pairs, len(value))}}}"
    return str(value)


def _items(texts: Iterable[str], count: int) -> str:
    more = [f"… {count} in all"] if count > _SHOWN_ITEMS else []
    return ", ".join([*itertools.islice(texts, _SHOWN_ITEMS), *more])
