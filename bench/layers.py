"""What the layers of the sandbox cost an inferlet's calls of the kernel, and of the ABI.

A program times them that runs bare, and as an inferlet on two servers, one of which sees no control
groups.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Any, Final

from piehost.host.client import Client

from .measure import calls, spread
from .served import HIDE_CGROUPS, programs, server

_KINDS: Final = ("call", "call with rules", "page")  # what `kernel.c` times


def kernel_calls(repeats: int, *options: str) -> dict[str, Any]:
    """Seconds a call outside of the sandbox, inside, and inside without control groups, and of a
    control call of the ABI with and without these; in turn, so that the machine's moods hit all
    alike."""
    samples: dict[str, list[dict[str, float]]] = {}
    with contextlib.ExitStack() as stack:
        built = stack.enter_context(programs())
        servers = {"sandboxed": stack.enter_context(server(*options))}
        if os.geteuid() == 0:
            servers["no cgroups"] = stack.enter_context(server(*options, under=HIDE_CGROUPS))
        for repeat in range(repeats + 1):  # the first is a warm-up
            taken = {"bare": _bare(built["kernel"]["c"])}
            for name, client in servers.items():
                taken[name] = _served(client, built["kernel"]["c"])
                trips = calls(client, built["calls"]["c"], 1000, 1)
                taken[name]["control call"] = trips["round_trip"]["median"]
            if repeat:
                for name, sample in taken.items():
                    samples.setdefault(name, []).append(sample)
    return {
        name: {kind: spread([sample[kind] for sample in taken]) for kind in taken[0]}
        for name, taken in samples.items()
    }


def _bare(program: Path) -> dict[str, float]:
    return _read(subprocess.run(program, stdout=subprocess.PIPE, check=True).stdout)


def _served(client: Client, program: Path) -> dict[str, float]:
    result = client.launch(program).result(timeout=60)
    if result.code != 0:
        raise SystemExit(f"{program} failed: {result.stderr.decode()}{result.reason}")
    return _read(result.stdout)


def _read(text: bytes) -> dict[str, float]:
    return {kind: float(ns) * 1e-9 for kind, ns in zip(_KINDS, text.split(), strict=True)}
