"""Steps for a small model in this process, and what they leave in its pool."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from piehost.gpu_backend.backend import Backend
from piehost.wire.step import Step, StepDone

from .checkpoints import VOCAB_SIZE
from .step_driver import i32

PAGE = 16


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, length).tolist()


def listed(
    number: int,
    tokens: list[int],
    positions: list[int],
    write: list[int],
    reads: list[int] | None = None,
    row: int = 0,
    **more: Any,
) -> Step:
    """One listed segment whose last input is kept in `row`."""
    slots = (reads or []) + write
    return Step(
        number,
        tokens=i32(tokens),
        positions=i32(positions),
        write_slots=i32(write),
        listed_inputs=i32([len(tokens)]),
        listed_kv=i32([len(slots)]),
        listed_slots=i32(slots),
        listed_masks=[None],
        keep_inputs=i32([len(tokens) - 1]),
        keep_rows=i32([row]),
        **more,
    )


def ok(done: StepDone) -> StepDone:
    assert done.error is None
    return done


def row(backend: Backend, number: int) -> torch.Tensor:
    return backend.pool.rows[number].clone()


def clear_all(backend: Backend) -> None:
    ok(backend.run(Step(0, clear_pages=i32(range(backend.pool.pages)))))
