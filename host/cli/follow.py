"""Follows a run on this terminal: what it says out, lines of stdin in, accounts at the end."""

from __future__ import annotations

import contextlib
import os
from typing import Any, Final

import click
import msgspec

from piehost.wire import client as wire
from piehost.wire.stats import SeatStats

from ..client import Client, Run
from ..errors import HostError, format_reason
from .printer import Printer
from .progress import LoadProgress

_STDIN: Final = 0
_READ_BYTES: Final = 65536


class StdinLines:
    """Lines of stdin, without their newlines. A terminal is read only by its foreground job."""

    def __init__(self) -> None:
        self._partial = b""
        self.open = _can_read_stdin()

    def read(self) -> list[bytes]:
        """The lines that one read completes; `open` is False after the last.

        HostError if a line is longer than a message may be.
        """
        try:
            data = os.read(_STDIN, _READ_BYTES)
        except OSError:
            data = b""
        *lines, self._partial = (self._partial + data).split(b"\n")
        if not data:
            self.open = False
            if self._partial:
                lines.append(self._partial)
        if any(len(line) > wire.MAX_INPUT_BYTES for line in (*lines, self._partial)):
            raise HostError(
                "a line of stdin is too long",
                f"a message holds at most {wire.MAX_INPUT_BYTES} octets",
                "break it into shorter lines",
                "input_too_long",
            )
        return lines


def _can_read_stdin() -> bool:
    try:
        return not os.isatty(_STDIN) or os.tcgetpgrp(_STDIN) == os.getpgrp()
    except OSError:  # closed
        return False


class Follower:
    """`collect`: print nothing of the messages and stdout until one JSON object at the end."""

    def __init__(self, collect: bool, stats: bool) -> None:
        self._collect = collect
        self._stats = stats
        self._printer = Printer(collect)
        self._progress = LoadProgress()

    def follow(self, client: Client, run: Run) -> int:
        """Returns the exit code once the run has ended.

        HostError if it could not be launched or the host died; BrokenPipeError if nobody reads.
        """
        stdin = StdinLines()
        if not stdin.open:
            run.close_input()
        while True:
            for event in run.take():
                match event:
                    case wire.Started():
                        self._progress.close()
                    case wire.Message():
                        self._printer.message(event.data)
                    case wire.Output():
                        self._printer.output(event.stream, event.data)
                    case wire.Ended():
                        self._end(run, event)
                        return event.code
            wanted = stdin.open and run.untaken < wire.INPUT_WINDOW  # else its writer waits
            if client.pump(also=(_STDIN,) if wanted else ()):
                for line in stdin.read():
                    run.send(line)
                if not stdin.open:
                    run.close_input()
            if client.progress is not None and not run.id:
                self._progress.show(client.progress)

    def abandon(self) -> None:
        """The run did not end by itself: leaves the terminal as it should be."""
        self._progress.close()
        with contextlib.suppress(OSError):
            self._printer.end_line()

    def _end(self, run: Run, ended: wire.Ended) -> None:
        self._progress.close()
        self._printer.end_line()
        if self._collect:
            self._printer.show_summary(self._summary(run, ended))
        if ended.reason is not None:
            click.echo(format_reason(ended.reason), err=True)
        if self._stats:
            click.echo(format_stats(ended), err=True)

    def _summary(self, run: Run, ended: wire.Ended) -> dict[str, Any]:
        return {
            "id": run.id,
            "code": ended.code,
            "reason": ended.reason,
            "stats": msgspec.to_builtins(ended.stats) | ratios(ended.stats),
            "usage": ended.usage,
        }


def ratios(stats: SeatStats) -> dict[str, float]:
    """Mean batch over the steps it was in; messages (both ways) per generated token."""
    return {
        "mean_batch": stats.batch_sum / stats.steps if stats.steps else 0.0,
        "messages_per_token": (
            (stats.frames_in + stats.frames_out) / stats.tokens_out if stats.tokens_out else 0.0
        ),
    }


def format_stats(ended: wire.Ended) -> str:
    """What `--stats` prints."""
    stats, ratio = ended.stats, ratios(ended.stats)
    lines = [
        f"steps                 {stats.steps}, mean batch {ratio['mean_batch']:.1f}",
        f"tokens                {stats.tokens_in} in, {stats.tokens_out} generated",
        f"bytes                 {stats.ring_bytes} by ring, {stats.message_bytes} by message",
        f"messages              {stats.frames_in} in, {stats.frames_out} out, "
        f"{stats.commands} commands",
        f"messages per token    {ratio['messages_per_token']:.2f}",
    ]
    if ended.usage is not None:
        lines.append(
            f"process               {ended.usage.user_seconds + ended.usage.system_seconds:.3f} s, "
            f"{ended.usage.max_rss_bytes / 2**20:.0f} MiB at most"
        )
    return "\n".join(lines)
