"""The weathers that harm: an error where there would be none, and the end of the connection.

A command on a queue really fails: the controller gets one that cannot work in its place, so that
the queue stops as docs/abi.md section 5 says, for all that comes behind it. A command without a
queue is not carried out at all.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from inferlet import abi
from inferlet.abi import AnyCommand
from inferlet.errors import HandleError

from ..frames import commands_of, frame
from ..ring_places import OUT_OF_ORDER
from .weather import Holding

INJECTED: Final = "injected by piehost conform"  # the message of every error that is
_HINT: Final = "this is a test: handle it as any other"
_NOBODYS: Final = 0xFFFFFFFF  # a kv handle that programs hardly use


def queue_in_order(command: AnyCommand) -> int | None:
    """The queue that an error of `command` stops; None if there is none."""
    queue: int | None = getattr(command, "queue", None)
    return None if isinstance(command, OUT_OF_ORDER) else queue


def op_of(command: AnyCommand) -> int:
    op = type(command).__struct_config__.tag
    assert isinstance(op, int)
    return op


def can_fail(command: AnyCommand) -> bool:
    """Whether the program would see it fail: by its own answer, or by its queue's."""
    return command.req is not None or queue_in_order(command) is not None


class Fault(Holding):
    """The `count`-th command with that op fails with `code`. From then on answers are held back,
    so that what the program sends behind them is sent in their knowledge."""

    def __init__(self, op: int, count: int, code: int) -> None:
        super().__init__()
        self._op = op
        self._left = count
        self._code = code

    def from_inferlet(self, body: bytes) -> None:
        commands = commands_of(body)
        if self._left > 0 and commands is not None:
            through = [each for command in commands for each in self._in_place_of(command)]
            if self._left == 0:
                body = msgspec.msgpack.encode(through)
        super().from_inferlet(body)

    def _in_place_of(self, command: AnyCommand) -> list[AnyCommand]:
        if self._left == 0 or op_of(command) != self._op or not can_fail(command):
            return [command]
        self._left -= 1
        if self._left:
            return [command]
        queue = queue_in_order(command)
        if queue is None:
            self.hold(msgspec.msgpack.encode([self._error(command.req)]))
            return []
        synchronizes = isinstance(command, abi.Synchronize)  # it tells of an error before it
        failing = abi.MaskKvPage(
            None if synchronizes else command.req, queue, (_NOBODYS, 0, 1), visible=True
        )
        return [failing, command] if synchronizes else [failing]

    def from_controller(self, body: bytes) -> None:
        if self._left:
            self.ends.tell(body)
            self.ends.to_inferlet(frame(body))
            return
        answers: list[list[Any]] = msgspec.msgpack.decode(body)
        if any(map(_is_ours, answers)):
            answers = [self._error(a[1]) if _is_ours(a) else a for a in answers]
            body = msgspec.msgpack.encode(answers)
        self.hold(body)

    def _error(self, request: int | None) -> list[Any]:
        return [abi.ANSWER_ERROR, request, self._code, INJECTED, _HINT]


def _is_ours(answer: list[Any]) -> bool:
    kind, _, *rest = answer
    return kind == abi.ANSWER_ERROR and rest[0] == HandleError.code and str(_NOBODYS) in rest[1]


class Cut(Holding):
    """The connection ends when frame `count` comes from the inferlet, unheard."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._left = count

    def from_inferlet(self, body: bytes) -> None:
        self._left -= 1
        if self._left > 0:
            super().from_inferlet(body)
        elif self._left == 0:
            self.close()
            self.ends.cut()

    def from_controller(self, body: bytes) -> None:
        if self._left > 0:
            super().from_controller(body)
