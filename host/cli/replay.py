"""`piehost replay`: run a program against a recording, without a model, and name what differs."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import time
from pathlib import Path
from typing import Final

import click
from inferlet.abi import Startup
from msgspec import structs

from piehost.wire.recording import Head

from .. import allotment, programs
from ..allotment import Quota
from ..errors import BadUsage, format_reason
from ..programs import Program
from ..quotas import parse_options
from ..recording import Recording
from ..replay import Outcome, Replay
from ..sandbox.failure import CONTROLS
from .printer import Printer
from .program_command import ProgramCommand

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# of the process itself; all others are told to it, so they are the recording's
_PROCESS_QUOTAS: Final = (
    "address_space", "stack", "threads", "fds", "file_size", "cpu_seconds", "output_bytes",
)  # fmt: skip


@click.command(cls=ProgramCommand)
@click.argument("recording", type=click.Path(exists=True, dir_okay=False))
@click.argument("program")
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[-- ARGS...]")
@click.option("--quota", multiple=True, metavar="KEY=VALUE", help="A cap of the process.")
@click.option(
    "--allow-degraded",
    multiple=True,
    type=click.Choice(CONTROLS),
    help="Run although this sandbox control is missing here.",
)
@click.option("--verbose", is_flag=True, help="Say so on stderr if nothing differs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def replay(
    recording: str,
    program: str,
    args: tuple[str, ...],
    quota: tuple[str, ...],
    allow_degraded: tuple[str, ...],
    verbose: bool,
    as_json: bool,
) -> None:
    """Run PROGRAM against RECORDING, which `piehost launch --record` made.

    There is no model and no server: what it asks for is compared with what was recorded, and it
    is told what was answered then. Its messages go to stdout. Exits as the recorded run did; or
    with 1, and the first difference on stderr. PROGRAM may be another than the recorded one, in
    another language too. It gets the recorded arguments unless others are given.
    """
    chosen = programs.resolve(str(Path(program).absolute()))
    programs.check_syntax(chosen)
    quotas = parse_options(quota)
    _check_quotas(quotas)
    whole = Recording(recording)
    startup = _startup(whole.head, list(args))
    caps = allotment.resolve(
        chosen.profile, startup.models[0], startup.limits.kv_pages, {}, chosen.quota, quotas
    )
    printer = Printer(collect=as_json)
    try:
        run = _run(whole, chosen, startup, caps, list(allow_degraded), printer)
        outcome = asyncio.run(run)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that nothing more fails at exit
        click.get_current_context().exit(128 + signal.SIGPIPE)
    printer.end_line()
    if as_json:
        printer.show_summary(_summary(whole, startup, outcome))
    _report(whole, startup, outcome, verbose)
    click.get_current_context().exit(outcome.code)


def _check_quotas(quotas: dict[str, str]) -> None:
    for key in quotas:
        if key not in _PROCESS_QUOTAS:
            raise BadUsage(
                f"--quota {key} cannot be chosen for a replay",
                "what the inferlet is told of its limits is the recording's",
                f"of these only: {', '.join(_PROCESS_QUOTAS)}",
                "bad_quota",
            )


def _startup(head: Head, args: list[str]) -> Startup:
    """What the program is told: the recorded, with as much time left as there was."""
    recorded = head.startup
    deadline = recorded.deadline
    if deadline is not None:
        deadline += time.time() - head.began
    return structs.replace(recorded, args=args or recorded.args, deadline=deadline)


async def _run(
    recording: Recording,
    program: Program,
    startup: Startup,
    quota: Quota,
    waived: list[str],
    printer: Printer,
) -> Outcome:
    """OSError if what the program is to be started with cannot be made."""
    replay = Replay(recording, program, startup, quota, waived, printer)
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, replay.interrupt, 128 + number)
    try:
        return await replay.outcome
    finally:
        replay.close()


def _report(recording: Recording, startup: Startup, outcome: Outcome, verbose: bool) -> None:
    """On stderr."""
    found = outcome.difference
    if found is None:
        if outcome.reason is not None:
            click.echo(format_reason(outcome.reason), err=True)
        if verbose and outcome.identical:
            click.echo(
                f"piehost: as recorded: {outcome.commands} commands, exit code {outcome.code}",
                err=True,
            )
        return
    lines = [f"piehost: not as in {recording.path}: {found.what}"]
    lines += [f"  recorded: {found.recorded}"] if found.recorded is not None else []
    lines += [f"  came:     {found.came}"] if found.came is not None else []
    lines += [f"  {field}" for field in found.fields]
    recorded = recording.head.startup.args
    if startup.args != recorded:
        args = f"recorded {shlex.join(recorded) or 'none'}, given {shlex.join(startup.args)}"
        lines.append(f"  the arguments are others: {args}")
    click.echo("\n".join(lines), err=True)


def _summary(recording: Recording, startup: Startup, outcome: Outcome) -> dict[str, object]:
    return {
        "identical": outcome.identical,
        "code": outcome.code,
        "commands": outcome.commands,
        "recorded_commands": recording.commands,
        "difference": outcome.difference,
        "reason": outcome.reason,
        "args": startup.args,
        "recorded_args": recording.head.startup.args,
    }
