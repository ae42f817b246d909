"""What a run says, on this terminal: messages and stdout on stdout, as they come or at the end."""

from __future__ import annotations

import sys

import msgspec


class Printer:
    """`collect`: print nothing of messages and stdout; they are for one JSON object at the end."""

    def __init__(self, collect: bool) -> None:
        self._collect = collect
        self._messages: list[bytes] = []
        self._stdout = bytearray()
        self._ends_in_newline = True

    def message(self, data: bytes) -> None:
        if self._collect:
            self._messages.append(data)
        else:
            self._write(data)

    def output(self, stream: int, data: bytes) -> None:
        """What the process wrote to its stdout (1) or stderr (2)."""
        if stream == 2:
            sys.stderr.buffer.write(data)
            sys.stderr.buffer.flush()
        elif self._collect:
            self._stdout += data
        else:
            self._write(data)

    def _write(self, data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        if data:
            self._ends_in_newline = data.endswith(b"\n")

    def end_line(self) -> None:
        """Text that does not end in a newline gets one: `$(...)` drops it, a terminal needs it."""
        if not self._ends_in_newline:
            self._write(b"\n")

    def show_summary(self, summary: dict[str, object]) -> None:
        """The JSON object: `summary`, and what was collected."""
        said = {
            "messages": [message.decode(errors="replace") for message in self._messages],
            "stdout": self._stdout.decode(errors="replace"),
        }
        self._write(msgspec.json.encode(summary | said) + b"\n")
