"""Tables and JSON on stdout. NO_COLOR and pipes are rich's business."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click
import msgspec

from ..log import printable

if TYPE_CHECKING:
    from rich.table import Table


def show_json(value: object) -> None:
    """One JSON document, indented."""
    click.echo(msgspec.json.format(msgspec.json.encode(value)).decode())


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table without borders; in a pipe, lines are as long as they need to be."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=10_000)
    console.print(table(columns, rows))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, no_wrap=True)
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    return made


def memory(octets: int) -> str:
    """As people read it: 640K, 12M, 3.4G."""
    size = octets / 1024
    for unit in "KM":
        if size < 1000:
            return f"{size:.0f}{unit}"
        size /= 1024
    return f"{size:.1f}G"


def seconds(number: float) -> str:
    """Of processor time."""
    return f"{number:.1f}s"
