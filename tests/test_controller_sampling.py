"""Sampling with control: masks, bias, log-probabilities and distributions; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from inferlet import abi, errors

from . import controller_fixtures
from .controller_answers import outcome
from .controller_process import LIMITS, VOCAB, ControllerProcess
from .controller_programs import EMB, KV, OUT, TOK, Q
from .controller_samples import FIRST, HIST, VECTOR, WIDTH, admit, after, answers, goes_on, sample
from .toy_device import distribution, log_probability

controller = controller_fixtures.audited  # the fixture


# --- masks and bias -------------------------------------------------------------------------------


def write_mask(controller: ControllerProcess, offset: int, tokens: list[int]) -> None:
    """Into ring in of the first inferlet."""
    bits = sum(1 << token for token in tokens)
    controller.device.rings_in[1][offset : offset + WIDTH] = bits.to_bytes(WIDTH, "little")


def test_only_tokens_of_the_mask_are_taken(controller: ControllerProcess) -> None:
    peer = admit(controller)
    allowed = [(FIRST + 40) % VOCAB, (FIRST + 30) % VOCAB, (FIRST - 1) % VOCAB]
    write_mask(controller, 77, allowed)
    peer.put(sample(mask=77), sample(2))
    assert controller.wait(peer, 1) == (FIRST + 30) % VOCAB
    assert peer.wait(2) == FIRST


def test_bias_is_added_and_counts_in_greedy_sampling(controller: ControllerProcess) -> None:
    peer = admit(controller)
    other = (FIRST + 5) % VOCAB
    peer.put(
        sample(1, bias=[(other, 4.5)]),
        sample(2, bias=[(other, 5.5)]),
        sample(3, bias=[(other, 2.75), (other, 2.75)]),
        sample(4, bias=[(FIRST, -0.5), (FIRST, -1.0)]),
    )
    second = (FIRST + 1) % VOCAB
    assert answers(controller, peer, 1, 2, 3, 4) == [FIRST, other, other, second]


def test_a_mask_without_a_token_stops_its_queue(controller: ControllerProcess) -> None:
    """What is in flight behind it fails too, frees apart; its token was never sampled."""
    peer = admit(controller)
    write_mask(controller, 0, [])
    peer.put(
        abi.AllocHistory(None, Q, HIST),
        sample(1, mask=0, history=HIST, stop=[FIRST]),
        abi.EmbedTxt(2, Q, (EMB, 0), [~TOK], 3),
        abi.Forward(3, Q, (EMB, 0, 1), [(KV, 0, 3)], (KV, 3, 1), (OUT, 0, 1)),
        sample(4, token=2),
        abi.AllocEmb(5, Q, 9, 1),
        abi.DeallocToken(6, Q, 2),
        abi.Synchronize(7, Q),
        abi.EmbedTxt(8, Q, (EMB, 0), [~TOK], 3),
    )
    assert len(controller.collect()) == 2, "the next step is on its way already"
    got = [outcome(controller, peer, i) for i in range(1, 9)]
    assert got[:5] == [errors.MaskError] * 5
    assert got[6:] == [errors.MaskError, errors.UnwrittenError]
    peer.put(abi.Synchronize(None, Q), abi.Forward(12, Q, (EMB, 0, 1), []))
    assert outcome(controller, peer, 12) is errors.UnwrittenError
    peer.put(abi.Synchronize(None, Q), *goes_on(3, 8), sample(9, history=HIST), sample(10))
    assert controller.wait(peer, 9) == after(8), "nothing of it is left in the KV"
    peer.put(sample(11, history=HIST, frequency_penalty=-900.0))
    assert controller.wait(peer, 11) == after(8), "nor in the history"


def test_two_inferlets_masks_come_from_their_own_rings(controller: ControllerProcess) -> None:
    peers = [admit(controller), admit(controller)]
    for number, peer in enumerate(peers, 1):
        bits = 1 << (FIRST + number) % VOCAB
        controller.device.rings_in[number][:WIDTH] = bits.to_bytes(WIDTH, "little")
        peer.put(sample(mask=0))
    for number, peer in enumerate(peers, 1):
        assert controller.wait(peer, 1) == (FIRST + number) % VOCAB


# --- log-probabilities and distributions ----------------------------------------------------------


def test_one_call_gives_the_token_its_log_probability_and_the_distribution(
    controller: ControllerProcess,
) -> None:
    peer = admit(controller)
    other = (FIRST + 2) % VOCAB
    peer.put(
        sample(1, bias=[(other, 9.0)], logprobs=True, k=5, offset=64),
        sample(2, logprobs=True),
        sample(3, k=2000, offset=1024),
        sample(4),
    )
    assert controller.wait(peer, 4) == FIRST
    assert peer.wait(1) == [other, log_probability(VECTOR, other, VOCAB), 5]
    assert peer.wait(2) == [FIRST, 0.0, 0]
    assert peer.wait(3) == [FIRST, 0.0, VOCAB]
    ring = controller.device.rings_out[1]
    assert ring[64:104] == distribution(VECTOR, 5, VOCAB), "before the bias"
    assert ring[1024 : 1024 + 8 * VOCAB] == distribution(VECTOR, VOCAB, VOCAB)


def test_dropped_samples_answer_nil_whatever_was_asked_for(controller: ControllerProcess) -> None:
    peer = admit(controller)
    peer.put(
        sample(1, stop=[FIRST], logprobs=True),
        *goes_on(3, ~TOK),
        sample(2, logprobs=True, k=4),
    )
    assert controller.wait(peer, 2) is None
    assert peer.wait(1) == [FIRST, 0.0, 0]


def test_lazy_answers_with_log_probabilities_share_frames(controller: ControllerProcess) -> None:
    peer = admit(controller)
    before = peer.frames
    for i in range(24):
        peer.put(sample(100 + i, lazy=True, logprobs=True), *goes_on(3 + i, i))
    assert controller.wait(peer, 123) == [after(*range(23)), 0.0, 0]
    assert peer.frames - before <= 24 / 2


# --- wrong commands -------------------------------------------------------------------------------


WRONG: dict[str, tuple[type[errors.InferletError], abi.Command]] = {
    "mask beyond the ring": (errors.ArgumentError, sample(9, mask=4096 - WIDTH + 1)),
    "mask at 2**32-1": (errors.ArgumentError, sample(9, mask=2**32 - 1)),
    "mask of nothing": (errors.MaskError, sample(9, mask=4096 - WIDTH)),
    "bias beyond the vocabulary": (errors.ArgumentError, sample(9, bias=[(VOCAB, 1.0)])),
    "bias is infinite": (errors.ArgumentError, sample(9, bias=[(1, float("-inf"))])),
    "bias is no number": (errors.ArgumentError, sample(9, bias=[(1, float("nan"))])),
    "bias beyond f32": (errors.ArgumentError, sample(9, bias=[(1, 1e300)])),
    "no such history": (errors.HandleError, sample(9, history=77)),
    "K above the cap": (errors.ArgumentError, sample(9, k=101)),
    "K beyond the ring": (errors.ArgumentError, sample(9, k=2, offset=LIMITS.ring_bytes - 12)),
    "K, ring alignment": (errors.ArgumentError, sample(9, k=2, offset=2)),
    "extend no history": (errors.HandleError, abi.ExtendHistory(9, Q, 77, [1])),
    "free no history": (errors.HandleError, abi.DeallocHistory(9, Q, 77)),
    "prompt beyond the vocabulary": (errors.ArgumentError, abi.AllocHistory(9, Q, 7, [VOCAB])),
    "prompt never sampled": (errors.UnwrittenError, abi.AllocHistory(9, Q, 7, [~55])),
    "token beyond the vocabulary": (errors.ArgumentError, abi.ExtendHistory(9, Q, HIST, [VOCAB])),
    "token never sampled": (errors.UnwrittenError, abi.ExtendHistory(9, Q, HIST, [~55])),
    "history in use": (errors.HandleError, abi.AllocHistory(9, Q, HIST)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_command_is_a_typed_error_and_changes_nothing(
    controller: ControllerProcess, name: str
) -> None:
    expected, wrong = WRONG[name]
    peer = admit(controller, ring_in_bytes=4096, top_k=100)
    peer.put(abi.AllocHistory(None, Q, HIST, [FIRST]), wrong, abi.Synchronize(10, Q))
    assert [outcome(controller, peer, i) for i in (9, 10)] == [expected] * 2
    peer.put(sample(1, history=HIST, repetition_penalty=1.5, presence_penalty=-800.0))
    assert controller.wait(peer, 1) == (FIRST + 1) % VOCAB


BAD_FIELDS: dict[str, list[Any]] = {
    "1,025 biases": [None] * 3 + [[[1, 0.0]] * 1025],
    "a bias of one": [None] * 3 + [[[1]]],
    "repetition penalty 0": [None] * 3 + [[], None, 0.0],
    "presence penalty that is no number": [None] * 3 + [[], None, 1.0, float("nan")],
    "mask at -1": [None] * 2 + [-1],
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_fields_out_of_range_end_their_sender_alone(
    controller: ControllerProcess, name: str
) -> None:
    peer = admit(controller)
    seed, _, mask, *rest = BAD_FIELDS[name] if len(BAD_FIELDS[name]) > 3 else [None, None, -1]
    fields: list[Any] = [0.0, 0, 1.0, 0.0, seed, [], False, mask, *rest]
    peer.put([19, 1, Q, [OUT, 0], TOK, *fields])
    with pytest.raises((EOFError, ConnectionError)):
        peer.wait(1)
    other = admit(controller)
    other.put(sample())
    assert controller.wait(other, 1) == FIRST
