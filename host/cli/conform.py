"""`piehost conform`: does a program keep the rules of the ABI?"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

import click
import msgspec

from piehost.wire.client import Progress

from .. import egress_grants, programs
from ..conform import report
from ..conform.rules import RULES, judge
from ..conform.runs import Run
from ..conform.trials import Subject, Trials
from ..ephemeral import EphemeralHost
from ..options import Options, named_model
from ..quotas import parse_options
from ..sandbox.failure import CONTROLS
from .program_command import ProgramCommand
from .progress import LoadProgress

_ALL = "all"


@click.command(cls=ProgramCommand)
@click.argument("program")
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[-- ARGS...]")
@click.option("--input", "inputs", multiple=True, metavar="TEXT", help="A message for `receive`.")
@click.option("--model", default="scripted", help="As of `launch`; scripted if not given.")
@click.option("--quota", multiple=True, metavar="KEY=VALUE", help="A cap of this inferlet.")
@click.option(
    "--egress",
    multiple=True,
    metavar="HOST[:PORT]",
    help="Let it send HTTP requests there.",
)
@click.option(
    "--allow-degraded",
    multiple=True,
    type=click.Choice(CONTROLS),
    help="Run although this sandbox control is missing here.",
)
@click.option(
    "--patience",
    type=click.IntRange(1),
    default=30,
    show_default=True,
    help="Seconds after which a run that has not ended hangs.",
)
@click.option(
    "--require",
    multiple=True,
    type=click.Choice([_ALL, *(rule.id for rule in RULES)]),
    metavar="RULE",
    help='Fail too if this rule was not exercised; "all": any rule.',
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_obj
def conform(
    debug: bool,
    program: str,
    args: tuple[str, ...],
    inputs: tuple[str, ...],
    model: str,
    quota: tuple[str, ...],
    egress: tuple[str, ...],
    allow_degraded: tuple[str, ...],
    patience: int,
    require: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run PROGRAM many times, and say which rules of the ABI it keeps and which it breaks.

    Its connection behaves in another way each time: answers come in pieces, late, in another
    order, errors come, the connection ends. For each rule: kept, broken (with the evidence), or
    not exercised. Exits with 0 if no rule is broken, else with 1. docs/conformance.md has the
    rules.
    """
    path = Path(program).absolute()
    programs.check_syntax(programs.resolve(str(path)))
    egress_grants.check(egress)
    subject = Subject(
        program=path,
        args=args,
        inputs=[text.encode() for text in inputs],
        quotas=parse_options(quota),
        waived=allow_degraded,
        egress=egress,
        patience=patience,
    )
    runs = _examine(subject, named_model(model), debug)
    verdicts = judge(runs)
    needed = [rule.id for rule in RULES if rule.id in require or _ALL in require]
    broken = any(verdict.broken for verdict in verdicts.values())
    passed = not broken and all(verdicts[rule].exercised for rule in needed)
    if as_json:
        document = report.as_json(verdicts, runs, passed)
        click.echo(msgspec.json.format(msgspec.json.encode(document)).decode())
    else:
        click.echo(report.as_text(verdicts, runs))
    click.get_current_context().exit(0 if passed else 1)


def _examine(subject: Subject, model: str, debug: bool) -> list[Run]:
    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)  # and with it the host, and what it runs
    progress = LoadProgress()

    def went(done: int, known: int) -> None:
        progress.show(Progress(f"run {done} of {known}", done / known))

    with (
        contextlib.closing(progress),
        tempfile.TemporaryDirectory(prefix="piehost-conform-") as folder,
    ):
        os.environ["PIEHOST_STORE"] = str(Path(folder) / "store.sqlite3")
        recordings = Path(folder) / "runs"
        recordings.mkdir()
        with EphemeralHost(Options(model=model), debug) as host:
            return Trials(host.client, subject, recordings, went).run()
