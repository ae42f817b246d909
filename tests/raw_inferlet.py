"""Python inferlets that speak the ABI in frames of their own, so that tests do not lean on an SDK.

A program written with `write_raw` finds: `ask(op, fields...)`, which returns the answer's value
or raises `Failed` with its `code`; `post(op, fields...)` and `take(request)`, its two halves;
`startup`, the start-up block; `say(text)`, a message for whoever launched it; and the ops by name,
in capitals.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from inferlet import abi

_PRELUDE = '''
import os
import struct
import sys
import time

import msgspec

startup = msgspec.msgpack.decode(os.pread(6, 1 << 20, 0))
_arrived = bytearray()
_answers = {}
_asked = 0


class Failed(Exception):
    def __init__(self, code, message, hint):
        super().__init__(f"{code}: {message} ({hint})")
        self.code = code


def post(op, *fields):
    global _asked
    _asked += 1
    body = msgspec.msgpack.encode([[op, _asked, *fields]])
    head = bytes((0, len(body))) if len(body) < 256 else struct.pack(">BQ", 2, len(body))
    rest = head + body
    while rest:
        rest = rest[os.write(3, rest):]
    return _asked


def _frames():
    while len(_arrived) >= 2:
        size, at = (_arrived[1], 2) if not _arrived[0] & 2 else (None, 9)
        if size is None:
            if len(_arrived) < 9:
                return
            (size,) = struct.unpack_from(">Q", _arrived, 1)
        if len(_arrived) < at + size:
            return
        for kind, request, *rest in msgspec.msgpack.decode(bytes(_arrived[at:at + size])):
            _answers[request] = (kind, rest)
        del _arrived[:at + size]


def take(request):
    while request not in _answers:
        data = os.read(3, 1 << 16)
        if not data:
            raise EOFError("the connection is closed")
        _arrived.extend(data)
        _frames()
    kind, rest = _answers.pop(request)
    if kind:
        raise Failed(*rest)
    return rest[0]


def ask(op, *fields):
    return take(post(op, *fields))


def failure(op, *fields):
    """The code of the error it is answered with; 0 if it worked."""
    try:
        ask(op, *fields)
    except Failed as error:
        return error.code
    return 0


def say(text):
    ask(SEND, str(text).encode())


'''

_OPS = {
    name: getattr(abi, name).__struct_config__.tag
    for name in (
        "Send", "Receive", "Quota", "StoreGet", "StoreSet", "StoreDelete", "StoreExists",
        "StoreList", "HttpGet", "HttpPost", "HttpWrite", "HttpRead", "HttpClose", "Spawn",
        "SendChild", "ReceiveChild", "CloseChild", "WaitChild", "EndChild",
    )
}  # fmt: skip


def _capitals(name: str) -> str:
    return "".join(f"_{c}" if c.isupper() and i else c for i, c in enumerate(name)).upper()


# has a child that has one, and says that the last of them is ready
DYNASTY = """
    generation = int(sys.argv[1])
    if generation < 2:
        ask(SPAWN, 1, "", [str(generation + 1)])
        say(ask(RECEIVE_CHILD, 1).decode())
    else:
        say("ready")
    ask(RECEIVE)
    time.sleep(3600)
"""


def write_raw(directory: Path, name: str, source: str) -> Path:
    """The path of the program."""
    path = directory / name
    ops = "".join(f"{_capitals(op)} = {tag}\n" for op, tag in _OPS.items())
    path.write_text(ops + _PRELUDE + textwrap.dedent(source))
    return path
