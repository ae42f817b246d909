"""`piehost ps`: what runs, and what has ended."""

from __future__ import annotations

import time

import click
import msgspec

from piehost.wire.client import EndedInfo, InferletInfo, Listing

from ..client import connect
from .show import memory, seconds, show_json, show_table

_COLUMNS = (
    "ID", "PID", "STATE", "AGE", "CPU", "MEMORY", "KV PAGES", "TOKENS OUT", "USER", "PARENT",
    "PROGRAM",
)  # fmt: skip


@click.command()
@click.option("--all", "everything", is_flag=True, help="Also the last that ended, and why.")
@click.option("--socket", help="The server's socket, if it is not the usual one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ps(everything: bool, socket: str | None, as_json: bool) -> None:
    """List running inferlets; with --all, those that have ended too, the latest first."""
    with connect(socket) as client:
        listing = client.listing(ended=everything)
    if as_json:
        show_json(_documents(listing))
        return
    rows = [_running(info) for info in listing.inferlets]
    if everything:
        more = [(*row, "-", "-") for row in rows] + [_ended(e) for e in reversed(listing.ended)]
        show_table((*_COLUMNS, "CODE", "REASON"), more)
    else:
        show_table(_COLUMNS, rows)


def _documents(listing: Listing) -> list[object]:
    return [
        *listing.inferlets,
        *({"state": "ended"} | msgspec.to_builtins(e) for e in reversed(listing.ended)),
    ]


def _running(i: InferletInfo) -> tuple[str, ...]:
    return (
        i.id,
        str(i.pid or "-"),
        i.state,
        f"{i.seconds:.0f}s",
        seconds(i.cpu_seconds),
        memory(i.memory_bytes),
        str(i.stats.kv_pages),
        str(i.stats.tokens_out),
        i.user,
        i.parent or "-",
        i.program,
    )


def _ended(e: EndedInfo) -> tuple[str, ...]:
    used = e.usage
    return (
        e.id,
        "-",
        f"ended {time.time() - e.at:.0f}s ago",
        f"{e.seconds:.0f}s",
        seconds(used.user_seconds + used.system_seconds) if used is not None else "-",
        memory(used.max_rss_bytes) if used is not None else "-",
        "-",
        str(e.stats.tokens_out),
        e.user,
        e.parent or "-",
        e.program,
        str(e.code),
        e.reason.code if e.reason is not None else "-",
    )
