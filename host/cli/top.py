"""`piehost top`: what runs and what it takes, again and again."""

from __future__ import annotations

import sys
import time
from typing import Any, Final

import click
import msgspec
from msgspec import Struct

from piehost.wire.client import HostStats, InferletInfo

from ..client import Client, connect
from .show import memory, show_json, show_table, table

_FIRST_SECONDS: Final = 0.5  # what --once looks over
_COLUMNS: Final = (
    "ID", "USER", "PROGRAM", "STATE", "WAITS FOR", "CPU %", "MEMORY", "KV PAGES", "TOK/S", "SLOWED",
)  # fmt: skip


class Row(Struct, kw_only=True):
    """One inferlet over the time between two looks."""

    id: str
    user: str
    program: str
    state: str
    waits_for: str
    cpu_percent: float  # of one core
    memory_bytes: int
    kv_pages: int
    swapped_pages: int  # of them, those in host memory
    tokens_per_second: float  # sampled and delivered
    slowed_seconds: float  # held up by its rates, since its launch


class Look(Struct):
    at: float
    inferlets: list[InferletInfo]
    host: HostStats


@click.command()
@click.option(
    "--sort",
    type=click.Choice(["cpu", "tokens"]),
    default="cpu",
    show_default=True,
    help="What the first rows have most of.",
)
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=2.0,
    show_default=True,
    help="Seconds between looks.",
)
@click.option("--once", is_flag=True, help="Print one table and exit; so it is in a pipe.")
@click.option("--socket", help="The server's socket, if it is not the usual one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and exit.")
def top(sort: str, interval: float, once: bool, socket: str | None, as_json: bool) -> None:
    """Show what each inferlet takes and waits for, until Ctrl-C."""
    with connect(socket) as client:
        before = _look(client)
        time.sleep(min(_FIRST_SECONDS, interval))
        after = _look(client)
        if as_json:
            show_json({"host": _totals(before, after), "inferlets": _rows(before, after, sort)})
        elif once or not sys.stdout.isatty():
            click.echo(_headline(before, after))
            show_table(_COLUMNS, map(_cells, _rows(before, after, sort)))
        else:
            _live(client, before, after, sort, interval)


def _live(client: Client, before: Look, after: Look, sort: str, interval: float) -> None:
    from rich.console import Group
    from rich.live import Live

    def shown() -> Group:
        rows = _rows(before, after, sort)
        return Group(_headline(before, after), "", table(_COLUMNS, map(_cells, rows)))

    try:
        with Live(shown(), auto_refresh=False, screen=True) as live:
            while True:
                time.sleep(interval)
                before, after = after, _look(client)
                live.update(shown(), refresh=True)
    except KeyboardInterrupt:
        return


def _look(client: Client) -> Look:
    return Look(time.monotonic(), client.inferlets(), client.stats())


def _rows(before: Look, after: Look, sort: str) -> list[Row]:
    seconds = after.at - before.at
    earlier = {info.id: info for info in before.inferlets}
    rows = []
    for info in after.inferlets:
        # of one that is new, all it has done was since then
        last = earlier.get(info.id)
        cpu = info.cpu_seconds - (last.cpu_seconds if last is not None else 0)
        tokens = info.stats.tokens_out - (last.stats.tokens_out if last is not None else 0)
        rows.append(
            Row(
                id=info.id,
                user=info.user,
                program=info.name,
                state=info.state,
                waits_for=info.stats.waits_for,
                cpu_percent=round(max(0.0, 100 * cpu / seconds), 1),
                memory_bytes=info.memory_bytes,
                kv_pages=info.stats.kv_pages,
                swapped_pages=info.stats.swapped_pages,
                tokens_per_second=round(tokens / seconds, 1),
                slowed_seconds=info.stats.slowed_seconds,
            )
        )
    rows.sort(key=lambda row: row.cpu_percent if sort == "cpu" else row.tokens_per_second)
    return rows[::-1]


def _totals(before: Look, after: Look) -> dict[str, Any]:
    """What all take over that time, and the server's counters: its own, and the controller's."""
    seconds = after.at - before.at
    last, now = before.host.controller, after.host.controller
    return {
        "inferlets": len(after.inferlets),
        "tokens_per_second": round(max(0, now.tokens_out - last.tokens_out) / seconds, 1),
        "steps_per_second": round(max(0, now.steps - last.steps) / seconds, 1),
        "launches": after.host.launches,
        "restarts": after.host.restarts,
        "rings_ready": after.host.rings_ready,
        **msgspec.to_builtins(now),
    }


def _headline(before: Look, after: Look) -> str:
    totals = _totals(before, after)
    return (
        f"{totals['inferlets']} inferlets, {totals['tokens_per_second']} tokens/s, "
        f"{totals['steps_per_second']} steps/s, "
        f"{totals['pages_free']} of {totals['pages_total']} KV pages free"
    )


def _cells(row: Row) -> tuple[str, ...]:
    swapped = f" ({row.swapped_pages})" if row.swapped_pages else ""
    return (
        row.id,
        row.user,
        row.program,
        row.state,
        row.waits_for or "-",
        f"{row.cpu_percent:.0f}",
        memory(row.memory_bytes),
        f"{row.kv_pages}{swapped}",
        f"{row.tokens_per_second:.1f}",
        f"{row.slowed_seconds:.1f}s" if row.slowed_seconds else "-",
    )
