"""Sampling and distributions against a naive reading of `docs/abi.md` section 8."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings

from piehost.gpu_backend.sampling import SamplingParams, distributions, sample

from .naive_sampling import naive, params, rows


@settings(max_examples=150, deadline=None)
@given(case=rows())
def test_sample_takes_what_the_definition_says(
    case: tuple[npt.NDArray[np.float32], SamplingParams],
) -> None:
    logits, p = case
    tokens = sample(torch.from_numpy(logits), p).tolist()
    for i, token in enumerate(tokens):
        if p.temperature[i] == 0:
            assert token == int(np.flatnonzero(logits[i] == logits[i].max())[0])
            continue
        own = logits[i].astype(np.float64)
        limits = float(p.top_p[i]), float(p.min_p[i])
        ids, chances = naive(own, float(p.temperature[i]), int(p.top_k[i]), *limits)
        ends = np.cumsum(chances)
        # single precision may fall on the other side of an edge that is as near as this
        assume(np.abs(ends[:-1] - p.uniform[i]).min(initial=1) > 1e-5)
        before = naive(own, float(p.temperature[i]), int(p.top_k[i]), 1.0, limits[1])[1]
        assume(limits[0] == 1 or np.abs(np.cumsum(before) - limits[0]).min() > 1e-5)
        expected = ids[min(int(np.searchsorted(ends, p.uniform[i], "right")), len(ids) - 1)]
        assert token == expected


def test_draws_are_as_frequent_as_they_are_probable() -> None:
    logits = np.array([1.0, 0.2, -1.0, 2.0, 0.2], np.float32)
    count = 40_000
    uniform = np.random.default_rng(3).random(count)
    drawn = sample(
        torch.from_numpy(logits).repeat(count, 1), params(count, temperature=0.7, uniform=uniform)
    )
    found = np.bincount(drawn.numpy(), minlength=5) / count
    ids, chances = naive(logits.astype(np.float64), 0.7, 0, 1.0, 0.0)
    assert found[ids] == pytest.approx(chances, abs=0.01)


def test_every_draw_of_a_flat_distribution_is_reached_in_order_of_id() -> None:
    vocab = 3000  # most of them lie outside the head that is looked at first
    uniform = (np.arange(vocab) + 0.5) / vocab
    drawn = sample(torch.zeros(vocab, vocab), params(vocab, uniform=uniform))
    assert drawn.tolist() == list(range(vocab))


def test_min_p_may_cut_far_behind_the_most_probable() -> None:
    logits = np.full(4000, np.log(0.4), np.float32)
    logits[:1500] = 0
    drawn = sample(torch.from_numpy(logits)[None], params(1, min_p=0.5, uniform=0.3))
    assert drawn.tolist() == [450]


def test_cold_and_hot_temperatures_stay_finite() -> None:
    logits = torch.tensor([[500.0, 501.0, -500.0]]).repeat(2, 1)
    drawn = sample(logits, params(2, temperature=[1e-30, 1e6], uniform=[0.99, 0.99]))
    assert drawn.tolist() == [1, 2]


def test_rows_do_not_influence_each_other() -> None:
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.normal(size=(6, 200)).astype(np.float32))
    p = params(6, [0, 1, 1, 0.5, 2, 1], [0, 0, 5, 0, 9, 0], [1, 0.5, 1, 1, 1, 1], uniform=0.7)
    together = sample(logits, p).tolist()
    one = [sample(logits[i : i + 1], p.take(np.array([i]))).item() for i in range(6)]
    assert together == one


@pytest.mark.parametrize("k", [1, 5, 300, 2000])
@pytest.mark.parametrize("equals", [False, True])
def test_distributions_are_the_softmax_most_probable_first(k: int, equals: bool) -> None:
    logits = np.random.default_rng(k).normal(size=(3, 2000)).astype(np.float32) * 3
    if equals:
        logits = np.round(logits)
    ids, chances = distributions(torch.from_numpy(logits), k)
    assert ids.dtype == torch.int32
    assert chances.dtype == torch.float32
    for i in range(3):
        wide = logits[i].astype(np.float64)
        softmax = np.exp(wide - wide.max()) / np.exp(wide - wide.max()).sum()
        order = np.lexsort((np.arange(2000), -wide))[:k]
        assert ids[i].tolist() == order.tolist()
        assert chances[i].numpy() == pytest.approx(softmax[order], rel=1e-5)


def test_minus_zero_equals_zero() -> None:
    logits = torch.full((1, 100), -1.0)
    logits[0, [7, 8, 9]] = torch.tensor([-0.0, 0.0, -0.0])
    assert distributions(logits, 3)[0].tolist() == [[7, 8, 9]]
