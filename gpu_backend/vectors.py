"""Vectors in and out: f32 of rings to rows of the pool, and rows or token embeddings to rings.

f32 holds every value of the dtypes models compute in, so a vector that goes out and comes back is
the same bit by bit.
"""

from __future__ import annotations

import numpy as np
import torch

from piehost.wire.step import Step

from .batch import integers
from .kv_pool import KvPool
from .loader import LoadedModel
from .shaping import ReadRing


def take_in(step: Step, pool: KvPool, read_ring: ReadRing) -> list[int]:
    """Fills rows from rings in. Returns which of `step.vectors` are refused: a number that is not
    finite in the model's dtype, or no such ring; zeros are in their place."""
    hidden = pool.rows.shape[1]
    refused, parts = [], []
    for i, (ring, offset, count) in enumerate(step.vectors):
        data = read_ring(ring, offset, 4 * count * hidden)
        part = torch.zeros(count, hidden, dtype=pool.rows.dtype)
        if data is not None:
            part = torch.from_numpy(np.frombuffer(data, np.float32).reshape(count, hidden).copy())
            part = part.to(pool.rows.dtype)
        if data is None or not bool(part.isfinite().all()):
            refused.append(i)
            part = torch.zeros_like(part)
        parts.append(part)
    rows = pool.upload(integers(step.vector_into))
    pool.rows.index_copy_(0, rows, torch.cat(parts).to(pool.device, non_blocking=True))
    return refused


def inputs(step: Step, tokens: torch.Tensor, loaded: LoadedModel, pool: KvPool) -> torch.Tensor:
    """Input embeddings [T, hidden] of a step with vectors among its inputs; `tokens` i64 [T]."""
    embeddings = loaded.embed(tokens)
    at = pool.upload(integers(step.vector_inputs))
    rows = pool.rows.index_select(0, pool.upload(integers(step.vector_rows)))
    return embeddings.index_copy(0, at, rows)


def give_out(step: Step, loaded: LoadedModel, pool: KvPool) -> torch.Tensor:
    """f32 [sum of the counts of `step.embeds`, hidden]: what rings out are to receive."""
    source = pool.upload(integers(step.embed_from))
    vectors = pool.rows.index_select(0, source.clamp_min(0))
    if step.embed_from and np.frombuffer(step.embed_from, np.int32).min() < 0:
        embeddings = loaded.embed((~source).clamp_min(0))
        vectors = torch.where((source < 0)[:, None], embeddings, vectors)
    return vectors.float()
