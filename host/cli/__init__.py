"""The `piehost` command: one file a verb, loaded only when it is used, so that a launch is quick.

Exit codes: 125 piehost failed, 126 the program is refused, 127 not found, 128 + n signal n, 2 wrong
usage, else the inferlet's own. Errors say what, why and what to try; `--debug`, before or behind
the verb, adds the traceback.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from typing import Final

import click

from piehost.wire.client import EXIT_HOST

from ..errors import HostError, exit_code_of

_VERBS: Final = {
    "serve": "Keep a model loaded for launches.",
    "launch": "Run an inferlet.",
    "replay": "Run an inferlet against a recording.",
    "conform": "Check that an inferlet keeps the rules of the ABI.",
    "new": "Write a new inferlet to begin with.",
    "ps": "List running inferlets.",
    "top": "Watch what inferlets take and wait for.",
    "inspect": "Show all about one inferlet.",
    "quota": "Show and change what an inferlet may use.",
    "stop": "End inferlets.",
    "models": "Show the served model.",
    "doctor": "Prove what the sandbox stops; show the machine.",
}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _VERBS:
            return None
        verb = getattr(importlib.import_module(f"{__name__}.{name}"), name)
        assert isinstance(verb, click.Command)
        _take_debug(verb)
        return verb

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_VERBS.items()))


def _take_debug(command: click.Command) -> None:
    """Behind the verb --debug means what it means before it."""

    def given(ctx: click.Context, option: click.Parameter, wanted: bool) -> None:
        ctx.obj = ctx.obj or wanted

    option = click.Option(
        ["--debug"], is_flag=True, hidden=True, expose_value=False, callback=given
    )
    if not any(known.name == option.name for known in command.params):
        command.params.append(option)
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            _take_debug(inner)


def _show_version(ctx: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from ..seats import VERSION

        click.echo(f"piehost {VERSION}")
        ctx.exit()


@click.command(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks and what piehost's processes print.")
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
@click.pass_context
def piehost(ctx: click.Context, debug: bool) -> None:
    """Programmable LLM serving: inferlets as sandboxed processes, batched on one accelerator."""
    ctx.obj = debug


def main() -> None:
    _open_streams()
    debug = "--debug" in itertools.takewhile(lambda word: word != "--", sys.argv[1:])
    try:
        code = piehost.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except HostError as error:
        if debug:
            raise
        print(error, file=sys.stderr)  # noqa: T201
        code = exit_code_of(error)
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except OSError as error:
        if debug:
            raise
        refused = HostError("the system refused something", str(error), "--debug shows where")
        print(refused, file=sys.stderr)  # noqa: T201
        code = EXIT_HOST
    except Exception as error:
        if debug:
            raise
        what = f"piehost: internal error: {type(error).__name__}: {error}"
        print(f"{what}\n  try: piehost --debug {' '.join(sys.argv[1:3])} ...", file=sys.stderr)  # noqa: T201
        code = EXIT_HOST
    sys.exit(code if isinstance(code, int) else 0)


def _open_streams() -> None:
    """Closed standard streams become /dev/null, or the next descriptor would take their place."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest free number, so this one
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            setattr(sys, name, open(fd, mode, closefd=False))  # noqa: SIM115
