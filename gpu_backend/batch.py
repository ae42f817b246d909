"""One step as arrays: `Step` decoded into numpy, in the words the attention engines use.

T inputs, P paged and L listed segments. Paged segments come first, then listed ones, each with its
inputs side by side. Nothing here knows torch or the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from piehost.wire.step import Step

Ints = npt.NDArray[np.int64]


def integers(data: bytes) -> Ints:
    """i64 copy of little-endian i32 bytes."""
    return np.frombuffer(data, np.int32).astype(np.int64)


@dataclass(slots=True)
class AttentionBatch:
    """Who attends to what in one step (see `wire.step.Step`)."""

    positions: Ints  # [T]
    write_slots: Ints  # [T]
    paged_inputs: Ints  # [P] inputs of each segment
    paged_kv: Ints  # [P] slots it attends to, its inputs' included
    paged_pages: Ints  # [sum(ceil(paged_kv / page_size))]
    listed_inputs: Ints  # [L]
    listed_kv: Ints  # [L]
    listed_slots: Ints  # [sum(listed_kv)]
    masks: list[bytes | None]  # [L] rows of packed bits, LSB first; None: visible and not later

    @classmethod
    def of(cls, step: Step) -> AttentionBatch:
        """The arrays of a step message. ValueError if they do not fit together."""
        batch = cls(
            positions=integers(step.positions),
            write_slots=integers(step.write_slots),
            paged_inputs=integers(step.paged_inputs),
            paged_kv=integers(step.paged_kv),
            paged_pages=integers(step.paged_pages),
            listed_inputs=integers(step.listed_inputs),
            listed_kv=integers(step.listed_kv),
            listed_slots=integers(step.listed_slots),
            masks=list(step.listed_masks) or [None] * (len(step.listed_inputs) // 4),
        )
        inputs = int(batch.paged_inputs.sum() + batch.listed_inputs.sum())
        if not len(batch.positions) == len(batch.write_slots) == inputs:
            raise ValueError(
                f"the segments have {inputs} inputs, with {len(batch.positions)} positions "
                f"and {len(batch.write_slots)} slots"
            )
        if len(batch.listed_slots) != int(batch.listed_kv.sum()):
            raise ValueError("listed_slots is not as long as listed_kv says")
        if len(batch.masks) != len(batch.listed_inputs):
            raise ValueError("listed_masks is not as long as listed_inputs")
        return batch


def starts(counts: Ints) -> Ints:
    """[n + 1] prefix sums of `counts` [n], from 0."""
    return np.concatenate(([0], np.cumsum(counts)))


def pages_of(kv: Ints, page_size: int) -> Ints:
    """[n] pages that `kv` [n] slots take."""
    return -(-kv // page_size)
