"""Sampling with control: masks, biases, penalties, log-probabilities."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from inferlet import (
    ArgumentError,
    Embeds,
    HandleError,
    MaskError,
    QuotaError,
    abi,
)
from scripted import Host
from scripted_device import (
    RING_BYTES,
    RING_IN_BYTES,
    VOCAB_SIZE,
    next_token,
)

FIRST = next_token(((0, 1), (1, 2), (2, 3)))  # after [1, 2, 3]
MASK_BYTES = -(-VOCAB_SIZE // 8)


def hidden(q: Any) -> Embeds:
    out: Embeds = q.forward(q.embed_txt([1, 2, 3]))
    return out


def test_a_mask_says_which_tokens_are_allowed(host: Host) -> None:
    allowed = np.zeros(VOCAB_SIZE, np.bool_)
    allowed[[5, 258]] = True
    with host.model.queue() as q:
        out = hidden(q)
        assert q.sample(out, mask=allowed).result() == 258  # the next one from FIRST on
        packed = np.packbits(allowed, bitorder="little").tobytes()
        assert q.sample(out, mask=packed).result() == 258
        assert q.sample(out, mask=~allowed).result() == FIRST
        assert q.sample(out, mask=b"\x01" + bytes(MASK_BYTES - 1)).result() == 0


def test_masks_share_the_ring_until_they_are_answered(host: Host) -> None:
    mask = np.ones(VOCAB_SIZE, np.bool_)
    fit = RING_IN_BYTES // 64  # a mask takes a cache line
    with host.model.queue() as q:
        out = hidden(q)
        for _ in range(2):  # the places of the first are free for the second
            tokens = [q.sample(out, mask=mask) for _ in range(fit)]
            with pytest.raises(QuotaError, match="ring in"):
                q.sample(out, mask=mask)
            assert {token.result() for token in tokens} == {FIRST}
            assert len({c.mask for c in host.controller.of(abi.Sample)}) == fit
        host.controller.fail_next = (abi.Sample, QuotaError("no", "yes"))
        failed = [q.sample(out, mask=mask) for _ in range(fit)]
        with pytest.raises(QuotaError):
            failed[-1].result()
        with pytest.raises(QuotaError):
            q.synchronize().result()
        assert q.sample(out, mask=mask).result() == FIRST  # those of failed ones are free too


@pytest.mark.parametrize(
    "mask",
    [
        np.ones(VOCAB_SIZE - 1, np.bool_),
        np.ones((1, VOCAB_SIZE), np.bool_),
        np.ones(VOCAB_SIZE, np.float32),
        np.zeros(VOCAB_SIZE, np.bool_),
        bytes(MASK_BYTES),
        b"\xff" * (MASK_BYTES + 1),
        [1, 2, 3],
        "all",
    ],
)
def test_masks_that_are_none_are_refused_here(host: Host, mask: Any) -> None:
    with host.model.queue() as q:
        out = hidden(q)
        with pytest.raises(MaskError) as caught:
            q.sample(out, mask=mask)
        assert caught.value.hint
        assert q.sample(out).result() == FIRST


def test_bias(host: Host) -> None:
    with host.model.queue() as q:
        out = hidden(q)
        bias: dict[Any, Any] = {FIRST: -100, np.int64(7): np.float32(0.5)}
        assert q.sample(out, bias=bias).result() == FIRST + 1
        (command,) = host.controller.of(abi.Sample)
        assert command.bias == [(FIRST, -100.0), (7, 0.5)]


def test_penalties_look_at_a_history(host: Host) -> None:
    with host.model.queue() as q:
        out = hidden(q)
        history = q.alloc_history([FIRST, FIRST, 1])
        assert q.sample(out, history=history, presence_penalty=0.5).result() == FIRST
        assert q.sample(out, history=history, frequency_penalty=0.5).result() == FIRST + 1
        token = q.sample(out, history=history, repetition_penalty=1.5)
        assert token.result() == FIRST + 2
        assert q.sample(out, history=q.alloc_history(), repetition_penalty=2).result() == FIRST
        history.extend([FIRST + 3, token])
        assert q.sample(out, history=history, repetition_penalty=1.5).result() == FIRST + 4
        prompt, added = host.controller.histories[history.number]
        assert (prompt, added) == (
            [FIRST, 1],  # each once
            [FIRST, FIRST + 1, FIRST + 2, FIRST + 3, FIRST + 2, FIRST + 4],
        )
        history.free()
        with pytest.raises(HandleError, match="freed"):
            q.sample(out, history=history)
        with pytest.raises(HandleError):
            history.extend([1])


def test_histories_are_freed_with_their_last_reference(host: Host) -> None:
    with host.model.queue() as q:
        history = q.alloc_history(range(10))
        q.synchronize().result()
        assert len(host.controller.histories) == 1
        del history
        gc.collect()
        q.synchronize().result()
        assert not host.controller.histories


def test_long_histories(host: Host) -> None:
    with host.model.queue() as q:
        history = q.alloc_history([i % 200 for i in range(50_000)])
        history.extend([1] * 10_000)
        q.synchronize().result()
        prompt, added = host.controller.histories[history.number]
        assert prompt == list(range(200)) and added == [1] * 10_000
        with pytest.raises(ArgumentError, match="a frame holds"):
            q.alloc_history(range(100_000, 120_000))
        q.synchronize().result()
    assert len(host.controller.of(abi.ExtendHistory)) == 3


def test_a_token_brings_its_logprob_and_distribution(host: Host) -> None:
    with host.model.queue() as q:
        out = hidden(q)
        plain, told, both = q.sample(out), q.sample(out, logprobs=True), q.sample(out, k=4)
        assert both.logprob is None and both.distribution is None  # not answered yet
        assert (plain.result(), plain.logprob, plain.distribution) == (FIRST, None, None)
        assert (told.result(), told.logprob, told.distribution) == (FIRST, -float(FIRST), None)
        assert (both.result(), both.logprob) == (FIRST, -float(FIRST))
        assert both.distribution is not None
        assert both.distribution.ids.tolist() == [FIRST + i for i in range(4)]
        assert len(q.sample(out, k=10**6).distribution or []) == 0
        whole = q.sample(out, k=10**6)
        whole.result()
        assert whole.distribution is not None and len(whole.distribution) == VOCAB_SIZE


def test_a_distribution_of_a_sample_keeps_its_place_in_the_ring(host: Host) -> None:
    with host.model.queue() as q:
        out = hidden(q)
        fit = RING_BYTES // 64
        tokens = [q.sample(out, k=8) for _ in range(fit)]
        assert tokens[-1].result() == FIRST
        with pytest.raises(QuotaError, match="ring out"):
            q.sample(out, k=8)
        view = tokens[0].distribution.ids  # type: ignore[union-attr]
        del tokens
        gc.collect()
        others = [q.sample(out, k=8) for _ in range(fit - 1)]
        assert others[-1].result() == FIRST
        offset = host.controller.of(abi.Sample)[0].offset
        assert offset not in {c.offset for c in host.controller.of(abi.Sample)[fit:]}
        assert view[0] == FIRST


def test_a_dropped_sample_has_neither(make_host: Callable[..., Host]) -> None:
    host = make_host(rule=lambda seen: 65)
    with host.model.queue() as q:
        first = q.sample(hidden(q), stop=[65], logprobs=True)
        dropped = q.sample(q.forward(q.embed_txt([first], 3)), logprobs=True, k=3)
        assert (first.result(), dropped.result()) == (65, None)
        assert dropped.logprob is None and dropped.distribution is None


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": "hot"},
        {"temperature": float("nan")},
        {"top_k": 1.5},
        {"seed": "1"},
        {"bias": [(1, 2.0)]},
        {"bias": {1: "2"}},
        {"bias": {-1: 2.0}},
        {"bias": {"a": 2.0}},
        {"bias": {1: float("nan")}},
        {"bias": dict.fromkeys(range(1025), 1.0)},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("inf")},
        {"presence_penalty": 1e7},
        {"frequency_penalty": None},
        {"repetition_penalty": 1.5},  # and no history
        {"history": 5},
        {"k": -1},
        {"k": "3"},
        {"stop": 5},
        {"stop": ["a"]},
        {"stop": "ab"},
        {"temprature": 1.0},
    ],
)
def test_wrong_sampling_is_refused_here(host: Host, options: dict[str, Any]) -> None:
    with host.model.queue() as q:
        out = hidden(q)
        with pytest.raises(ArgumentError) as caught:
            q.sample(out, **options)
        assert caught.value.message and caught.value.hint
        assert q.sample(out).result() == FIRST


def test_what_is_refused_here_was_never_made(host: Host) -> None:
    """So it is not freed either, which would stop the queue."""
    with host.model.queue() as q:
        out, gone = hidden(q), q.alloc_kvpage()
        q.dealloc_kvpage(gone)
        for refused in (
            lambda: q.sample(out, mask=b""),
            lambda: q.import_kvpage(""),
            lambda: q.share_kvpage(gone),
            lambda: q.alloc_history(["a"]),  # type: ignore[list-item]
            lambda: q.write_emb(np.ones((2, 3))),
            lambda: q.embed_txt([1], [1, 2]),
        ):
            with pytest.raises(Exception, match="try:"):
                refused()
        gc.collect()
        q.synchronize().result()
        assert q.sample(out).result() == FIRST
