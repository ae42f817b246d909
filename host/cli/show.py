"""Tables and JSON on stdout. NO_COLOR and pipes are rich's business."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import click
import msgspec


def show_json(value: object) -> None:
    """One JSON document, indented."""
    click.echo(msgspec.json.format(msgspec.json.encode(value)).decode())


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table without borders; in a pipe, lines are as long as they need to be."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=10_000)
    console.print(table)
