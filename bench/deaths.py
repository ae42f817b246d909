"""From kill -9 of an inferlet in the middle of a batch until its KV pages are free again."""

from __future__ import annotations

import os
import signal
import statistics
import time
from pathlib import Path
from typing import Any

from piehost.host.client import Client, Run
from piehost.wire.client import Ended, HostStats

from .served import messages

PROMPT_TOKENS = 200
NEW_TOKENS = 1000


def deaths(client: Client, program: Path, kills: int, at_once: int = 8) -> dict[str, Any]:
    """Kills one after the other of `at_once` generating inferlets, each replaced at once.

    Seconds from the signal to the first answer of the controller in which no page is held but by
    those that live: what it says took a round trip to ask.
    """
    runs = [_generating(client, program) for _ in range(at_once)]
    taken, pages = [], []
    for kill in range(kills):
        stats = client.stats()
        while not (victim := _in_batch(stats, runs[kill % at_once])):
            if runs[kill % at_once].over:  # it came to its own end
                runs[kill % at_once] = _generating(client, program)
            stats = client.stats()
        pages.append(stats.seats[victim.id].kv_pages)
        start = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        while not _is_freed(client.stats(), victim.id):
            pass
        taken.append(time.monotonic() - start)
        for event in victim.events():
            if isinstance(event, Ended):
                break
        runs[kill % at_once] = _generating(client, program)
    for run in runs:
        run.cancel()
        run.result(60)
    percentiles = statistics.quantiles(taken, n=100, method="inclusive")
    return {
        "kills": kills,
        "at_once": at_once,
        "pages_each": statistics.median(pages),
        "p50": percentiles[49],
        "p99": percentiles[98],
        "max": max(taken),
    }


def _generating(client: Client, program: Path) -> Run:
    arguments = ["--prompt-tokens", str(PROMPT_TOKENS), "--new-tokens", str(NEW_TOKENS)]
    run = client.launch(program, arguments)
    messages(run, 1)
    run.send(b"go")
    return run


def _in_batch(stats: HostStats, run: Run) -> Run | None:
    """`run`, if it holds pages and generates."""
    seat = stats.seats.get(run.id)
    return run if seat is not None and seat.kv_pages and seat.tokens_out else None


def _is_freed(stats: HostStats, dead: str) -> bool:
    held = sum(seat.kv_pages - seat.swapped_pages for seat in stats.seats.values())
    seat = stats.seats.get(dead)
    total = stats.controller
    return not (seat and seat.kv_pages) and total.pages_total - total.pages_free == held
