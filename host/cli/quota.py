"""`piehost quota`: show and change what a running inferlet may use."""

from __future__ import annotations

import click
import msgspec

from piehost.wire.client import EXIT_NOT_FOUND, Details, Reason

from ..client import connect
from ..errors import FailedAnswer
from ..quotas import QUOTAS, as_text, is_octets, parse_options
from .show import memory, show_json, show_table


@click.group()
def quota() -> None:
    """Show and change the quotas of a running inferlet. docs/operations.md explains them."""


@quota.command()
@click.argument("inferlet", metavar="ID")
@click.option("--socket", help="The server's socket, if it is not the usual one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(inferlet: str, socket: str | None, as_json: bool) -> None:
    """Show every quota of ID: used, cap, where the cap is given, what comes of passing it."""
    with connect(socket) as client:
        inspected = client.inspect(inferlet)
    if inspected.details is None:
        reason = Reason(
            code="not_found",
            what=f"{inferlet} has ended",
            hint=f"piehost inspect {inferlet} says how",
        )
        raise FailedAnswer(EXIT_NOT_FOUND, reason)
    if as_json:
        show_json({key: _document(key, inspected.details) for key in inspected.details.quotas})
    else:
        show_quotas(inspected.details)


def show_quotas(details: Details) -> None:
    """As a table."""
    rows = []
    for key, use in details.quotas.items():
        beyond = QUOTAS[key].beyond + (" (fixed)" if QUOTAS[key].fixed else "")
        rows.append((key, _used(key, use.used), as_text(key, use.cap), use.source, beyond))
    show_table(("QUOTA", "USED", "CAP", "GIVEN IN", "BEYOND IT"), rows)


def _used(key: str, number: float | None) -> str:
    if number is None:
        return "-"
    return memory(int(number)) if is_octets(key) else f"{number:.1f}".removesuffix(".0")


def _document(key: str, details: Details) -> dict[str, object]:
    known = QUOTAS[key]
    use: dict[str, object] = msgspec.to_builtins(details.quotas[key])
    return use | {"live": not known.fixed, "beyond": known.beyond}


@quota.command("set")
@click.argument("inferlet", metavar="ID")
@click.argument("changes", nargs=-1, required=True, metavar="KEY=VALUE...")
@click.option("--socket", help="The server's socket, if it is not the usual one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def set_quota(inferlet: str, changes: tuple[str, ...], socket: str | None, as_json: bool) -> None:
    """Change quotas of ID while it runs, all that are given or none. It keeps what it holds beyond
    them. No ceiling holds here; "none" lifts a cap that need not be."""
    with connect(socket) as client:
        done = client.set_quota(inferlet, parse_options(changes, "quota set"))
    if as_json:
        show_json({"before": done.before, "after": done.after})
        return
    for key, number in done.after.items():
        click.echo(f"{key}: {as_text(key, done.before[key])} -> {as_text(key, number)}")
