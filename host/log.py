"""The server's log: lines on its stderr, which never hold it up."""

from __future__ import annotations

import contextlib
import os
import select
from typing import Final

_STDERR: Final = 2


def printable(text: str) -> str:
    """Without what could move a terminal's cursor, or end a line."""
    return "".join(char if char.isprintable() else " " for char in text)


def log(text: str) -> None:
    """One line. It is lost if nobody takes what is on stderr: the host serves on."""
    line = printable(f"piehost: {text}").encode(errors="replace")
    poll = select.poll()
    poll.register(_STDERR, select.POLLOUT)
    if any(events & select.POLLOUT for _, events in poll.poll(0)):
        with contextlib.suppress(OSError):  # closed
            # a pipe that can be written takes PIPE_BUF octets without waiting
            os.write(_STDERR, line[: select.PIPE_BUF - 1] + b"\n")
