"""`piehost serve`: a host that stays, with its model loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from piehost.wire.client import EXIT_HOST, Progress

from .. import egress_grants
from ..errors import format_reason
from ..quotas import parse_options
from ..rundir import server_socket
from .model_options import as_options, given, model_options

if TYPE_CHECKING:
    from piehost.wire.step import Ready


class _Terminal:
    """Progress on stderr if it is a terminal; one line on stdout when launches can come."""

    def __init__(self, socket: str) -> None:
        from .progress import LoadProgress

        self._socket = socket
        self._progress = LoadProgress()

    def loading(self, progress: Progress) -> None:
        self._progress.show(progress)

    def ready(self, ready: Ready) -> None:
        self._progress.close()
        click.echo(
            f"piehost: serving {ready.model.name} ({ready.model.architecture}, {ready.device}, "
            f"{ready.engine} attention, {ready.pages} pages of {ready.model.page_size}) "
            f"at {self._socket}, loaded in {ready.load_seconds:.1f} s"
        )
        sys.stdout.flush()


@click.command()
@model_options
@click.option("--quota", multiple=True, metavar="KEY=VALUE", help="Default and ceiling.")
@click.option(
    "--egress",
    multiple=True,
    metavar="HOST[:PORT]",
    help="Ceiling of what launches may grant; without it they may grant anything.",
)
@click.option(
    "--config",
    "config_path",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Quotas of users and programs; by default piehost/piehost.toml in $XDG_CONFIG_HOME "
    "(~/.config), else /etc/piehost/piehost.toml.",
)
@click.option("--socket", help="Where to listen, if not in the run directory.")
def serve(
    quota: tuple[str, ...],
    egress: tuple[str, ...],
    config_path: Path | None,
    socket: str | None,
    **model: Any,
) -> None:
    """Keep a model loaded; `piehost launch` finds this server. Ctrl-C ends it and all it runs.

    On SIGHUP it reads its configuration again. It logs what passes a hard limit on stderr.
    """
    from .. import config
    from ..server import serve as run

    path = server_socket(socket)
    egress_grants.check(egress)
    options = as_options(
        given(model), parse_options(quota), list(egress) or None, config_path or config.find()
    )
    failure = run(options, path, _Terminal(str(path)))
    if failure is not None:
        click.echo(format_reason(failure), err=True)
        click.get_current_context().exit(EXIT_HOST)
