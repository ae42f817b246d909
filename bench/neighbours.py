"""Honest inferlets beside some that spin, flood or never read: what is left of their tokens.

Each sample is the throughput of 16 honest ones beside attackers over that just before and after,
alone, so that the machine's moods hit both alike. It is taken from two servers in turn: one as it
is, and one that sees no control groups.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from piehost.host.client import Client
from piehost.host.errors import HostError

from .measure import calls, served_decode, spread
from .served import HIDE_CGROUPS, messages, programs, server

HONEST: Final = 16
_PROMPT, _NEW = 32, 96  # tokens
_SETTLE_SECONDS: Final = 0.1  # until attackers are at it, and in their groups
# what they do -> (program, threads of each, how many)
ATTACKERS: Final = {
    "1 spins": ("spin", 1, 1),
    "1 spins with 4 threads": ("spin", 4, 1),
    "4 spin": ("spin", 1, 4),
    "16 spin": ("spin", 1, 16),
    "1 floods": ("flood", 1, 1),
    "1 never reads": ("never_read", 1, 1),
}


def neighbours(repeats: int, *options: str) -> list[dict[str, Any]]:
    """Of each attack, for each kind of honest inferlet: throughput alone (tokens/s) and its ratio
    beside the attackers, and the round trip of a control call (s) alone and beside them."""
    with contextlib.ExitStack() as stack:
        built = stack.enter_context(programs())
        servers = {"as it is": stack.enter_context(server(*options))}
        if os.geteuid() == 0:
            servers["no cgroups"] = stack.enter_context(server(*options, under=HIDE_CGROUPS))
        return [
            {"attack": attack, "honest": language, "server": name, **measured}
            for language in built["clock"]
            for attack in ATTACKERS
            for name, measured in _compare(servers, built, language, attack, repeats).items()
        ]


def _compare(
    servers: dict[str, Client],
    built: dict[str, dict[str, Path]],
    language: str,
    attack: str,
    repeats: int,
) -> dict[str, dict[str, Any]]:
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for repeat in range(repeats + 1):  # the first is a warm-up
        for name, client in servers.items():
            sample = _sample(client, built, language, attack)
            if repeat:
                samples[name].append(sample)
    return {
        name: {key: spread([sample[key] for sample in taken]) for key in taken[0]}
        for name, taken in samples.items()
    }


def _sample(
    client: Client, built: dict[str, dict[str, Path]], language: str, attack: str
) -> dict[str, float]:
    def honest() -> float:
        measured = served_decode(client, built["clock"][language], HONEST, _PROMPT, _NEW)
        return measured["tokens_per_second"]

    def round_trip() -> float:
        return calls(client, built["calls"]["c"], 1000, 1)["round_trip"]["median"]

    before, trip_alone = honest(), round_trip()
    with _attackers(client, built, attack):
        beside, trip_beside = honest(), round_trip()
    alone = (before + honest()) / 2
    return {
        "alone": alone,
        "ratio": beside / alone,
        "round_trip_alone": trip_alone,
        "round_trip_beside": trip_beside,
    }


@contextlib.contextmanager
def _attackers(client: Client, built: dict[str, dict[str, Path]], attack: str) -> Iterator[None]:
    program, threads, count = ATTACKERS[attack]
    runs = [client.launch(built[program]["c"], ["--threads", str(threads)]) for _ in range(count)]
    for run in runs:
        messages(run, 1)
    time.sleep(_SETTLE_SECONDS)
    yield
    for run in runs:
        run.cancel()
        with contextlib.suppress(HostError):
            reason = run.result(timeout=60).reason
            if reason is None or reason.code != "cancelled":
                raise SystemExit(f"an attacker ended early: {reason}")
