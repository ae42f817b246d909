"""The host process: run loop, signals, and what ends it.

`piehost serve` calls `serve`. A `piehost launch` that finds no server runs an ephemeral host:

    python -m piehost.host.server --ephemeral NAME --lifeline FD --options JSON

FD is one end of a socketpair; its end-of-file, however the launcher died, ends everything.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import os
import resource
import signal
from pathlib import Path
from typing import Final

from piehost.wire.client import Progress, Reason
from piehost.wire.step import Ready

from . import options, rundir
from .config import Settings
from .host import Host, Observer

_PR_SET_NAME: Final = 15


def serve(chosen: options.Options, socket: Path, observer: Observer) -> Reason | None:
    """Serves until a signal ends it; the reason if it failed.

    HostError if another server listens at `socket`, the socket cannot be made, or piehost.toml is
    wrong.
    """
    settings = Settings(chosen.config, chosen.quotas, chosen.egress)
    rundir.remove_stale()
    claim = rundir.Claim(socket)
    try:
        return asyncio.run(_run(claim, chosen, settings, observer, lifeline=None))
    finally:
        claim.release()


async def _run(
    claim: rundir.Claim,
    chosen: options.Options,
    settings: Settings,
    observer: Observer,
    lifeline: int | None,
) -> Reason | None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))  # six per inferlet
    ctypes.CDLL(None).prctl(_PR_SET_NAME, b"pie-host")
    loop = asyncio.get_running_loop()
    end = asyncio.Event()
    # nohup(1) has it outlive the terminal
    has_terminal = _has_terminal() and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, end.set)
    if lifeline is not None:
        loop.add_reader(lifeline, end.set)
    host = Host(claim, chosen, settings, observer)
    if lifeline is None:

        def hang_up() -> None:  # the terminal it was started from is closed, or somebody asks
            if has_terminal and not _has_terminal():
                end.set()
            else:
                host.reload()

        loop.add_signal_handler(signal.SIGHUP, hang_up)
    try:
        if lifeline is None:
            ends = [asyncio.create_task(event.wait()) for event in (end, host.ended)]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in ends:
                task.cancel()
        else:  # a failed ephemeral host stays to tell its client, who may not have asked yet
            await end.wait()
    finally:
        if lifeline is not None:
            loop.remove_reader(lifeline)
        host.close()
    return host.failure


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


class _Silent:
    def loading(self, progress: Progress) -> None:
        """Clients hear it themselves."""

    def ready(self, ready: Ready) -> None:
        """Likewise."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ephemeral", required=True)
    parser.add_argument("--lifeline", type=int, required=True)
    parser.add_argument("--options", type=options.decode, required=True)
    arguments = parser.parse_args()
    os.set_inheritable(arguments.lifeline, False)
    claim = rundir.claim_ephemeral(arguments.ephemeral)
    with contextlib.ExitStack() as stack:
        stack.callback(rundir.release_ephemeral, claim)
        chosen = arguments.options
        settings = Settings(chosen.config, chosen.quotas, chosen.egress)
        asyncio.run(_run(claim, chosen, settings, _Silent(), arguments.lifeline))


if __name__ == "__main__":
    main()
