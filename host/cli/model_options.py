"""The options that choose a model and how it runs; `serve` and `launch` share them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ..options import Options, named_model

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--model",
        help='A folder, a hub id, "default": the embedded model, or "scripted[:FILE.toml]": one '
        "that says what a script tells it.",
    ),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"])),
    click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"])),
    click.option(
        "--engine", type=click.Choice(["auto", "torch", "flashinfer"]), help="Attention engine."
    ),
    click.option("--page-size", type=click.Choice(["8", "16", "32"]), help="Slots a KV page."),
    click.option("--kv-pages", type=click.IntRange(1), help="KV pages of the machine."),
    click.option(
        "--kv-memory",
        type=click.FloatRange(0, 1, min_open=True),
        help="Or: the fraction of the free memory that they take. [default: 0.5]",
    ),
    click.option(
        "--swap-pages",
        type=click.IntRange(0),
        help="Pages of host memory for KV pages of inferlets that wait while others have none; 0: "
        "the newest inferlets are ended instead. [default: as many as KV pages]",
    ),
    click.option("--max-context", type=click.IntRange(1), help="Longest context, in tokens."),
    click.option("--threads", type=click.IntRange(1), help="Processor threads of the backend."),
    click.option(
        "--policy",
        type=click.Choice(["work-conserving", "eager"]),
        help="When the batcher dispatches a step.",
    ),
)


def model_options(command: F) -> F:
    """Adds them to a command; they arrive as keyword arguments, None if not given."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def given(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those that were given. UsageError if two of them contradict each other."""
    chosen = {name: value for name, value in arguments.items() if value is not None}
    if {"kv_pages", "kv_memory"} <= chosen.keys():
        raise click.UsageError("give --kv-pages or --kv-memory, not both")
    if "page_size" in chosen:
        chosen["page_size"] = int(chosen["page_size"])
    if "model" in chosen:
        chosen["model"] = named_model(chosen["model"])
    return chosen


def as_options(
    chosen: dict[str, Any],
    quotas: dict[str, str] | None = None,
    egress: list[str] | None = None,
    config: Path | None = None,
) -> Options:
    """`config` is the piehost.toml there is, if any."""
    path = str(config.absolute()) if config is not None else None
    return Options(**chosen, quotas=quotas or {}, egress=egress, config=path)
