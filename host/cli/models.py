"""`piehost models`: what the server has loaded."""

from __future__ import annotations

from typing import Any

import click

from piehost.wire.client import ModelList

from ..client import connect
from ..errors import HostError
from .show import show_json, show_table


@click.command()
@click.option("--socket", help="The server's socket, if it is not the usual one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def models(socket: str | None, as_json: bool) -> None:
    """Show the model the server has loaded, or the one a launch would load."""
    row: dict[str, Any] = {"name": "default", "state": "not loaded (no server runs)"}
    try:
        with connect(socket) as client:
            row = _row(client.models())
    except HostError as error:
        if error.reason.code != "no_server":
            raise
    if as_json:
        show_json([row])
        return
    columns = ("name", "state", "architecture", "max_context", "page_size", "device", "engine")
    cells = [str(row.get(column, "-")) for column in columns]
    show_table([column.upper().replace("_", " ") for column in columns], [cells])


def _row(listed: ModelList) -> dict[str, Any]:
    row: dict[str, Any] = {"name": listed.options["model"], "state": "loading"}
    if listed.model is not None:
        row = listed.model | {"state": "loaded", "device": listed.device, "engine": listed.engine}
        row |= {"kv_pages": listed.pages, "load_seconds": listed.load_seconds}
    return row | {"options": listed.options}
