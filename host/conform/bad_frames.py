"""What is wrong with a frame's body that the typed decoder refuses, as a rule's id and in words."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec
from inferlet import abi
from inferlet.abi import AnyCommand
from msgspec import Struct

from ..handles import kind_of

_KINDS: Final = {kind.__struct_config__.tag: kind for kind in abi.Command.__subclasses__()}
_MAX_REQUEST: Final = 0xFFFFFFFF
_REFS: Final = ("tokens", "prompt")  # token ids, and handles as their complement
_decode: Final = msgspec.msgpack.Decoder(AnyCommand).decode


class Fault(Struct):
    rule: str  # its id
    why: str


def find(body: bytes) -> Fault:
    """The first fault."""
    try:
        commands = msgspec.msgpack.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        return Fault("frame-body", f"{error}; it begins with {body[:24].hex(' ')}")
    if not isinstance(commands, list):
        return Fault("frame-body", f"it is a {type(commands).__name__}, not an array of commands")
    if len(commands) > abi.MAX_COMMANDS_PER_FRAME:
        most = f"{abi.MAX_COMMANDS_PER_FRAME:,}"
        return Fault("frame-commands", f"it holds {len(commands):,} commands; the most is {most}")
    for at, command in enumerate(commands):
        fault = _of_command(command)
        if fault is not None:
            return Fault(fault.rule, f"command {at + 1} of the frame: {fault.why}")
    return Fault("frame-body", "it is not an array of commands")


def _of_command(command: Any) -> Fault | None:
    if not isinstance(command, list) or not command or command[0] not in _KINDS:
        op = command[0] if isinstance(command, list) and command else command
        return Fault("command-op", f"there is no op {str(op)[:40]}")
    request: Any = command[1] if len(command) > 1 else "missing"
    if request is not None and not (type(request) is int and 0 <= request <= _MAX_REQUEST):
        return Fault("request-id", f"its request id is {str(request)[:40]}")
    try:
        _decode(msgspec.msgpack.encode(command))
    except (msgspec.MsgspecError, RecursionError) as error:
        return _of_field(command, str(error))
    return None


def _of_field(command: list[Any], why: str) -> Fault:
    """`why` is msgspec's, which ends in the path of what is wrong."""
    kind = _KINDS[command[0]]
    path = re.search(r"`\$\[(\d+)\](?:\[(?:\d+|\.\.\.)\])*`$", why)
    place = int(path[1]) - 1 if path else -1  # the op comes before the fields
    field = kind.__struct_fields__[place] if 0 <= place < len(kind.__struct_fields__) else ""
    value = command[place + 1] if field and place + 1 < len(command) else None
    for handle in _handles(value) if kind_of(kind, field) and field not in _REFS else ():
        if not 1 <= handle <= _MAX_REQUEST:
            return Fault("handle-range", f"{kind.__name__}: {field} is handle {handle}")
    return Fault("command-fields", f"{kind.__name__}{f', {field}' if field else ''}: {why}")


def _handles(value: Any) -> list[int]:
    """Of a handle, a span or an index, or a list of spans."""
    spans = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    firsts = [span[0] if isinstance(span, list) and span else span for span in spans]
    return [first for first in firsts if type(first) is int]
