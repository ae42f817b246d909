"""Sampling as `docs/abi.md` section 8 says it, and random rows to sample from."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from piehost.gpu_backend.sampling import SamplingParams

Floats = npt.NDArray[np.float64]


def params(
    count: int,
    temperature: object = 1.0,
    top_k: object = 0,
    top_p: object = 1.0,
    min_p: object = 0.0,
    uniform: object = 0.5,
) -> SamplingParams:
    return SamplingParams(
        np.broadcast_to(np.float32(temperature), count),  # type: ignore[arg-type]
        np.broadcast_to(np.int32(top_k), count),  # type: ignore[call-overload]
        np.broadcast_to(np.float32(top_p), count),  # type: ignore[arg-type]
        np.broadcast_to(np.float32(min_p), count),  # type: ignore[arg-type]
        np.broadcast_to(np.float64(uniform), count),  # type: ignore[arg-type]
    )


def naive(
    logits: Floats, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[npt.NDArray[np.int64], Floats]:
    """(token ids, probabilities) that are left, most probable first."""
    order = np.lexsort((np.arange(len(logits)), -logits))
    weights = np.exp((logits[order] - logits[order[0]]) / temperature)
    keep = len(order)
    if top_k:
        keep = min(keep, top_k)
    keep = int((weights[:keep] >= min_p).sum())
    chances = weights[:keep] / weights[:keep].sum()
    if top_p < 1:
        keep = int(np.searchsorted(np.cumsum(chances), top_p - 1e-12)) + 1
        chances = chances[:keep] / chances[:keep].sum()
    return order[:keep], chances[:keep]


@st.composite
def rows(draw: st.DrawFn) -> tuple[npt.NDArray[np.float32], SamplingParams]:
    vocab = draw(st.sampled_from([2, 7, 50, 1100, 5000]))
    random = np.random.default_rng(draw(st.integers(0, 2**20)))
    count = draw(st.integers(1, 4))
    spread = draw(st.sampled_from([0.1, 1.0, 4.0]))
    logits = (spread * random.normal(size=(count, vocab))).astype(np.float32)
    if draw(st.booleans()):
        logits = np.round(logits)  # many equals
    pick = lambda *options: random.choice(options, count)  # noqa: E731
    return logits, SamplingParams(
        temperature=pick(0.0, 0.3, 1.0, 2.5).astype(np.float32),
        top_k=pick(0, 1, 3, 40, 1500).astype(np.int32),
        top_p=pick(1.0, 0.9, 0.3, 1e-3).astype(np.float32),
        min_p=pick(0.0, 0.0, 0.05, 0.5, 1.0).astype(np.float32),
        uniform=np.append(random.random(count - 1), pick(0.0, 0.999999)[:1]),
    )
