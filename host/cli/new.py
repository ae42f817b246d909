"""`piehost new`: a folder with an inferlet that launches, tests and type-checks at once."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Final

import click

from ..errors import HostError

# One folder a language; @NAME@ stands for the inferlet's name.
_TEMPLATES: Final = Path(__file__).resolve().parent / "templates"
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,47}")
_PROMPT: Final = '"The capital of France is"'
_NEXT: Final = {
    "python": [f"piehost launch . -- --prompt {_PROMPT}", "pytest"],
    "c": ["make", f"piehost launch . -- {_PROMPT}", "make test"],
}


@click.command()
@click.argument("folder", metavar="NAME")
@click.option("--lang", type=click.Choice(list(_NEXT)), default="python", show_default=True)
def new(folder: str, lang: str) -> None:
    """Write the folder NAME with an inferlet to begin with: program, tests, README."""
    path = Path(folder)
    name = path.name
    if not _NAME.fullmatch(name):
        raise click.BadParameter(
            f"{name!r} cannot be the name of an inferlet: up to 48 letters, digits, dashes and "
            "underscores, a letter first",
            param_hint="NAME",
        )
    try:
        path.mkdir()
    except FileExistsError as error:
        raise HostError(
            f"there is something at {path} already",
            "a new inferlet gets a folder of its own, and nothing is overwritten",
            "choose another name, or move it away",
            "exists",
        ) from error
    except OSError as error:
        raise HostError(
            f"cannot make the folder {path}",
            error.strerror or str(error),
            "choose a place that is there and that you may write",
            "cannot_write",
        ) from error
    files = sorted(file for file in (_TEMPLATES / lang).iterdir() if file.is_file())
    for file in files:
        (path / file.name).write_text(file.read_text().replace("@NAME@", name))
    click.echo(f"{path} has {', '.join(file.name for file in files)}. Next:\n")
    for command in (f"cd {shlex.quote(str(path))}", *_NEXT[lang]):
        click.echo(f"    {command}")
