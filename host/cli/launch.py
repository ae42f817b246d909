"""`piehost launch`: run one inferlet, as if it were a program started here."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import click

from .. import egress_grants, programs, rundir
from ..client import Client, connect
from ..errors import HostError
from ..quotas import QUOTAS, parse_options
from ..sandbox.failure import CONTROLS
from .follow import Follower
from .model_options import as_options, given, model_options
from .program_command import ProgramCommand


class Interrupted(BaseException):
    """A signal that ends the launch."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


@click.command(cls=ProgramCommand, epilog=f"Quotas (docs/cli.md): {', '.join(QUOTAS)}.")
@click.argument("program")
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[-- ARGS...]")
@model_options
@click.option("--quota", multiple=True, metavar="KEY=VALUE", help="A cap of this inferlet.")
@click.option("--user", default="", help="Whose store, topics and exports it sees.")
@click.option("--job", default="", help="A name that several launches may share.")
@click.option(
    "--egress",
    multiple=True,
    metavar="HOST[:PORT]",
    help="Let it send HTTP requests there: a name, *.name, an address or a network.",
)
@click.option(
    "--allow-degraded",
    multiple=True,
    type=click.Choice(CONTROLS),
    help="Run although this sandbox control is missing here.",
)
@click.option("--record", default="", metavar="FILE", help="Record the run, for replay.")
@click.option("--stats", is_flag=True, help="Print counters on stderr at the end.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@click.option("--socket", help="Use the server at this socket.")
def launch(
    program: str,
    args: tuple[str, ...],
    quota: tuple[str, ...],
    user: str,
    job: str,
    egress: tuple[str, ...],
    allow_degraded: tuple[str, ...],
    record: str,
    stats: bool,
    as_json: bool,
    socket: str | None,
    **model: Any,
) -> None:
    """Run PROGRAM: a script (Python, Node, Perl), an executable, or a folder with inferlet.toml.

    Its messages go to stdout as they come; lines of stdin go to its `receive`. The exit code is
    its own. A running server is used if it was started with the model options given here; else a
    host is started for this launch alone.
    """
    context = click.get_current_context()
    chosen = given(model)
    path = Path(program).absolute()
    programs.check_syntax(programs.resolve(str(path)))
    quotas = parse_options(quota)
    egress_grants.check(egress)
    follower = Follower(collect=as_json, stats=stats)
    code = 0
    try:
        with _signals(), _host(chosen, socket, context.obj) as client:
            run = client.launch(
                path,
                args,
                quotas,
                allow_degraded,
                user=user,
                job=job,
                egress=egress,
                record=record,
            )
            try:
                code = follower.follow(client, run)
            except BaseException:
                follower.abandon()
                raise
    except Interrupted as interrupted:
        code = interrupted.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that nothing more fails at exit
        code = 128 + signal.SIGPIPE
    context.exit(code)


@contextlib.contextmanager
def _host(chosen: dict[str, Any], socket: str | None, debug: bool) -> Iterator[Client]:
    """A client of the running server if it fits, else of a host of our own."""
    path = rundir.server_socket(socket)
    explicit = bool(socket or os.environ.get("PIEHOST_SOCKET"))
    if explicit or rundir.lock_owner(path) is not None:
        with connect(str(path)) as client:
            different = _differences(client, chosen) if chosen else {}
            if not different:
                yield client
                return
            if explicit:
                raise HostError(
                    f"the server at {path} was started otherwise",
                    ", ".join(f"its {name} is {value}" for name, value in different.items()),
                    "leave these options out, or --socket, to use another host",
                    "other_options",
                )
    from .. import config
    from ..ephemeral import EphemeralHost

    found = config.find()
    if found is not None:
        config.load(found)  # the host does so too, but nobody hears it
    with EphemeralHost(as_options(chosen, config=found), debug) as host:
        yield host.client


def _differences(client: Client, chosen: dict[str, Any]) -> dict[str, str]:
    """Options of the server that differ from those given here."""
    options = client.models().options
    return {
        name: options.get(name, "the default")
        for name, value in chosen.items()
        if options.get(name) != str(value)
    }


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Turns the signals that end a command into `Interrupted`, once; then they are ignored, so
    that what follows can end everything else."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
