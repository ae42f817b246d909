"""`piehost ps`: what runs."""

from __future__ import annotations

import sys

import click

from piehost.wire.client import InferletInfo

from ..client import connect
from ..errors import HostError
from .show import show_json, show_table


@click.command()
@click.option("--socket", help="The server's socket, if it is not the usual one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ps(socket: str | None, as_json: bool) -> None:
    """List running inferlets."""
    inferlets: list[InferletInfo] = []
    try:
        with connect(socket) as client:
            inferlets = client.inferlets()
    except HostError as error:
        if error.reason.code != "no_server":
            raise
        if not as_json:
            click.echo(str(error), file=sys.stderr)
            return
    if as_json:
        show_json(inferlets)
        return
    show_table(
        ("ID", "PID", "STATE", "AGE", "KV PAGES", "TOKENS OUT", "USER", "PARENT", "PROGRAM"),
        [
            (
                i.id,
                str(i.pid or "-"),
                i.state,
                f"{i.seconds:.0f}s",
                str(i.stats.kv_pages),
                str(i.stats.tokens_out),
                i.user,
                i.parent or "-",
                i.program,
            )
            for i in inferlets
        ],
    )
