"""A scripted model samples as the model on torch does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from piehost.gpu_backend import scripted_sampling
from piehost.gpu_backend.sampling import SamplingParams, distributions, log_probabilities, sample
from piehost.gpu_backend.shaping import Shaping
from piehost.wire.step import Step

from .naive_sampling import naive, params, rows
from .step_driver import i32


@settings(max_examples=150, deadline=None)
@given(case=rows())
def test_draws_are_those_of_the_sampler_on_torch(
    case: tuple[Any, SamplingParams],
) -> None:
    logits, p = case
    expected = sample(torch.from_numpy(logits), p).tolist()
    for i, token in enumerate(expected):
        own = logits[i].astype(np.float64)
        heat, top_k = float(p.temperature[i]), int(p.top_k[i])
        top_p, min_p = float(p.top_p[i]), float(p.min_p[i])
        if heat > 0:  # single precision may fall on the other side of an edge this near
            ends = np.cumsum(naive(own, heat, top_k, top_p, min_p)[1])
            assume(np.abs(ends[:-1] - p.uniform[i]).min(initial=1) > 1e-5)
            before = naive(own, heat, top_k, 1.0, min_p)[1]
            assume(top_p == 1 or np.abs(np.cumsum(before) - top_p).min() > 1e-5)
        drawn = scripted_sampling.draw(logits[i], heat, top_k, top_p, min_p, float(p.uniform[i]))
        assert drawn == token


@pytest.mark.parametrize("place", range(8))
def test_a_draw_on_an_edge_is_the_next_token(place: int) -> None:
    p = params(1, uniform=place / 8)
    assert sample(torch.zeros(1, 8), p).tolist() == [place]
    assert scripted_sampling.draw(np.zeros(8, np.float32), 1.0, 0, 1.0, 0.0, place / 8) == place


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), k=st.integers(1, 400))
def test_distributions_and_shaping_are_those_of_torch(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(size=300) * 3, 1).astype(np.float32)
    ids, chances = distributions(torch.from_numpy(logits)[None], min(k, 300))
    data = scripted_sampling.distribution(logits, k)
    assert np.frombuffer(data[: len(data) // 2], "<u4").tolist() == ids[0].tolist()
    assert np.frombuffer(data[len(data) // 2 :], "<f4") == pytest.approx(
        chances[0].numpy(), rel=1e-4
    )
    token = int(rng.integers(300))
    wanted = log_probabilities(
        torch.from_numpy(logits)[None], torch.tensor([token], dtype=torch.int32)
    )
    assert scripted_sampling.log_softmax(logits)[token] == pytest.approx(wanted.item(), rel=1e-5)

    history = rng.integers(0, 20, int(rng.integers(0, 30)))
    prompt = int(rng.integers(0, len(history) + 1))
    factors = (float(rng.choice([1.0, 1.3, 0.7])), *rng.normal(size=2).tolist())
    mask = np.packbits(rng.random(300) < 0.5, bitorder="little").tobytes()
    step = Step(
        0,
        penalties=[(0, *factors, prompt, len(history))],
        history=i32(history),
        masks=[(0, 1, 0)],
    )
    shaping = Shaping.of(step, 300, lambda *_: mask, torch.from_numpy)
    assert shaping is not None
    expected = shaping.apply(torch.from_numpy(logits)[None], 0)[0].numpy()
    shaped = logits.copy()
    scripted_sampling.penalize(shaped, history, prompt, *factors)
    assert scripted_sampling.allow_only(shaped, mask)
    assert shaped == pytest.approx(expected, abs=1e-5)
