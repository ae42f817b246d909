"""One launched inferlet as its client sees it: what it says, what it is sent, how it ends."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from piehost.wire import client as wire
from piehost.wire.client import HostToClient
from piehost.wire.stats import SeatStats

from .errors import FailedAnswer, Refused

if TYPE_CHECKING:
    from .client import Client

RunEvent = wire.Started | wire.Message | wire.Output | wire.Ended


class Result(msgspec.Struct, kw_only=True):
    """All of a finished run. `code` is the inferlet's exit code, or 128 + signal, or 125."""

    id: str
    code: int
    reason: wire.Reason | None
    messages: list[bytes]
    stdout: bytes
    stderr: bytes
    stats: SeatStats

    @property
    def text(self) -> str:
        """The messages, joined."""
        return b"".join(self.messages).decode(errors="replace")


class Run:
    """One launched inferlet. `id` and `pid` are known once it has started."""

    def __init__(self, client: Client, request: int) -> None:
        self.id = ""
        self.pid = 0
        self._client = client
        self._request = request
        self._events: deque[RunEvent] = deque()
        self._failed: wire.Failed | None = None
        self.over = False
        self.untaken = 0  # the weight of what was sent and it has not received yet

    def send(self, data: bytes) -> None:
        """A message for its `receive`. Refused if it is longer than 60,000 octets."""
        if len(data) > wire.MAX_INPUT_BYTES:
            raise Refused(
                f"a message of {len(data)} octets is too long",
                f"a message holds at most {wire.MAX_INPUT_BYTES} octets",
                "send it in parts",
                "input_too_long",
            )
        self.untaken += wire.weight(data)
        self._client.say(wire.Input(self._request, data))

    def close_input(self) -> None:
        """`receive` fails with `closed` once everything sent is read."""
        self._client.say(wire.CloseInput(self._request))

    def cancel(self) -> None:
        """Ends it; `Ended` follows."""
        self._client.say(wire.Cancel(self._request))

    def take(self) -> list[RunEvent]:
        """The events that have come, without waiting. FailedAnswer if the launch failed."""
        if self._failed is not None:
            raise FailedAnswer(self._failed.code, self._failed.reason)
        events = list(self._events)
        self._events.clear()
        return events

    def events(self) -> Iterator[RunEvent]:
        """Every event up to `Ended`, waiting for them.

        FailedAnswer if it could not be launched; HostError if the host died.
        """
        while True:
            for event in self.take():
                yield event
                if isinstance(event, wire.Ended):
                    return
            if self.over and not self._events and self._failed is None:
                return
            if not self._events:
                self._client.pump()

    def result(self, timeout: float | None = None) -> Result:
        """Waits for the end. TimeoutError after `timeout` seconds; else as `events`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        messages: list[bytes] = []
        output = {1: bytearray(), 2: bytearray()}
        while True:
            for event in self.take():
                match event:
                    case wire.Message():
                        messages.append(event.data)
                    case wire.Output():
                        output[event.stream] += event.data
                    case wire.Ended():
                        return Result(
                            id=self.id,
                            code=event.code,
                            reason=event.reason,
                            messages=messages,
                            stdout=bytes(output[1]),
                            stderr=bytes(output[2]),
                            stats=event.stats,
                        )
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"{self.id or 'the launch'} has not ended")
            self._client.pump(left)

    def received(self, message: HostToClient) -> None:
        """For the client: an event of this run."""
        match message:
            case wire.Started():
                self.id, self.pid = message.id, message.pid
                self._events.append(message)
            case wire.Message() | wire.Output():
                self._events.append(message)
            case wire.InputTaken():
                self.untaken -= message.weight
            case wire.Ended():
                self.over = True
                self._events.append(message)
            case wire.Failed():
                self.over = True
                self._failed = message
