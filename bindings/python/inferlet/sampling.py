"""Sampling parameters, checked before they are sent, and late-bound tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict, cast

from .abi import MAX_STOP_TOKENS
from .errors import ArgumentError
from .future import Future
from .spans import TokenHandle

if TYPE_CHECKING:
    from .connection import Connection


class Sampling(TypedDict, total=False):
    """How to draw a token (`docs/abi.md`, sample); what is left out is off.

    Logits are divided by the temperature; then `top_k` keeps the k most probable, `min_p` those
    with at least min_p times the top probability, `top_p` the fewest that reach top_p.
    """

    temperature: float  # 0 takes the most probable token, whatever the rest says
    top_k: int
    top_p: float  # in (0, 1]
    min_p: float  # in [0, 1]
    seed: int | None  # 0 to 2**64 - 1: the same draws every time; None: random


def check_sampling(options: Sampling) -> Sampling:
    """`options` with wire types. ArgumentError if one is out of its range."""
    temperature = float(options.get("temperature", 0.0))
    top_k = options.get("top_k", 0)
    top_p = float(options.get("top_p", 1.0))
    min_p = float(options.get("min_p", 0.0))
    seed = options.get("seed")
    if not 0 <= temperature <= 1e6:
        raise _out_of_range("temperature", temperature, "0 (greedy) to 1e6")
    if not 0 <= top_k <= 0xFFFFFFFF:
        raise _out_of_range("top_k", top_k, "0 (off) or more")
    if not 0 < top_p <= 1:
        raise _out_of_range("top_p", top_p, "above 0, to 1 (off)")
    if not 0 <= min_p <= 1:
        raise _out_of_range("min_p", min_p, "0 (off) to 1")
    if seed is not None and not 0 <= seed < 1 << 64:
        raise _out_of_range("seed", seed, "0 to 2**64 - 1")
    return {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
    }


def check_stop(stop: Sequence[int]) -> list[int]:
    """`stop` as sent. ArgumentError if there are too many or one is no token id."""
    if len(stop) > MAX_STOP_TOKENS:
        raise _out_of_range("the number of stop tokens", len(stop), f"0 to {MAX_STOP_TOKENS}")
    for token in stop:
        if not 0 <= token <= 0xFFFFFFFF:
            raise _out_of_range("a stop token", token, "a token id")
    return [int(token) for token in stop]


def _out_of_range(name: str, value: float, valid: str) -> ArgumentError:
    return ArgumentError(f"{name} is {value}, which is out of range", f"use {valid}")


class Token(Future["int | None"]):
    """A sampled token: the accelerator knows it first, this future when its answer comes.

    `embed_txt` takes it before that. Its value is None if an earlier stop dropped the sample.
    """

    __slots__ = ("handle",)

    def __init__(self, connection: Connection, handle: TokenHandle) -> None:
        super().__init__(connection, lambda value: cast("int | None", value))
        self.handle = handle
