"""`piehost stop`: end inferlets."""

from __future__ import annotations

import click

from ..client import connect
from .show import show_json


@click.command()
@click.argument("inferlet", metavar="ID", required=False)
@click.option("--all", "everything", is_flag=True, help="End all inferlets.")
@click.option("--socket", help="The server's socket, if it is not the usual one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def stop(inferlet: str | None, everything: bool, socket: str | None, as_json: bool) -> None:
    """End the inferlet ID, or all. The server itself is ended by Ctrl-C or SIGTERM."""
    if (inferlet is None) == (not everything):
        raise click.UsageError("give an ID (see `piehost ps`), or --all")
    with connect(socket) as client:
        ids = client.stop(inferlet)
    if as_json:
        show_json({"stopped": ids})
    else:
        for stopped in ids:
            click.echo(stopped)
