"""`piehost inspect`: all about one inferlet."""

from __future__ import annotations

import time

import click
import msgspec

from piehost.wire.client import Details, EndedInfo, InferletInfo, Reason
from piehost.wire.stats import SeatStats

from ..client import connect
from .quota import show_quotas
from .show import memory, seconds, show_json, show_table


@click.command()
@click.argument("inferlet", metavar="ID")
@click.option("--socket", help="The server's socket, if it is not the usual one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(inferlet: str, socket: str | None, as_json: bool) -> None:
    """Show all about ID: what it is, used and left, the sandbox, its children, why it ended.

    The last 64 inferlets that ended can be inspected too.
    """
    with connect(socket) as client:
        found = client.inspect(inferlet)
    if as_json:
        parts = [part for part in (found.info, found.details) if part is not None]
        document: dict[str, object] = {}
        for part in parts:
            document |= msgspec.to_builtins(part)
        if found.ended is not None:
            document = {"state": "ended"} | msgspec.to_builtins(found.ended)
        show_json(document)
    elif found.ended is not None:
        _show_ended(found.ended)
    elif found.info is not None and found.details is not None:
        _show_running(found.info, found.details)


def _show_running(info: InferletInfo, details: Details) -> None:
    facts = [
        ("id", info.id),
        ("program", info.program),
        ("profile", details.profile),
        ("pid", str(info.pid or "-")),
        ("client", str(info.client_pid)),
        ("state", info.state),
        *_reason(info.reason),
        ("waits for", info.stats.waits_for or "-"),
        ("age", f"{info.seconds:.0f}s"),
        ("cpu", seconds(info.cpu_seconds)),
        ("memory", memory(info.memory_bytes)),
        ("user", info.user),
        ("job", info.job),
        ("parent", info.parent or "-"),
        ("children", ", ".join(details.children) or "-"),
        ("egress", ", ".join(details.egress) or "nowhere"),
        ("sandbox", ", ".join(details.controls) or "-"),
        ("cgroups", ", ".join(details.cgroups) or "-"),
        ("waived", ", ".join(details.waived) or "-"),
    ]
    show_table(("INFERLET", ""), facts)
    click.echo()
    show_quotas(details)
    click.echo()
    _show_counters(info.stats)


def _show_ended(ended: EndedInfo) -> None:
    used = ended.usage
    cpu = seconds(used.user_seconds + used.system_seconds) if used is not None else "-"
    facts = [
        ("id", ended.id),
        ("program", ended.program),
        ("state", f"ended {time.time() - ended.at:.0f}s ago"),
        ("exit code", str(ended.code)),
        *_reason(ended.reason),
        ("ran", f"{ended.seconds:.1f}s"),
        ("cpu", cpu),
        ("memory", f"{memory(used.max_rss_bytes)} at most" if used is not None else "-"),
        ("user", ended.user),
        ("job", ended.job),
        ("parent", ended.parent or "-"),
    ]
    show_table(("INFERLET", ""), facts)
    click.echo()
    _show_counters(ended.stats)


def _reason(reason: Reason | None) -> list[tuple[str, str]]:
    if reason is None:
        return []
    why = f": {reason.why}" if reason.why else ""
    return [("reason", f"{reason.code}: {reason.what}{why}")]


def _show_counters(stats: SeatStats) -> None:
    counters = msgspec.to_builtins(stats)
    rows = [
        (name.replace("_", " "), f"{number:,.1f}".removesuffix(".0"))
        for name, number in counters.items()
        if not isinstance(number, str)
    ]
    show_table(("COUNTER", ""), rows)
