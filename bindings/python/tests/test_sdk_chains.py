"""Chains of late-bound steps: few frames, the next one queued before the last has run out."""

from __future__ import annotations

from typing import Any

from inferlet import abi
from scripted import Host


def samples(frame: list[Any]) -> int:
    return sum(isinstance(c, abi.Sample) for c in frame)


def test_at_most_0_3_frames_a_token_both_ways(host: Host) -> None:
    with host.model.context("The capital of France is") as context:
        tokens = list(context.generate_tokens(128))
    frames = len(host.controller.frames) + host.controller.answer_frames
    assert len(tokens) == 128 and frames <= 0.3 * 128


def test_at_most_0_3_frames_a_token_when_every_piece_is_sent(host: Host) -> None:
    with host.model.context("The capital of France is") as context:
        for piece in context.generate(128):
            host.runtime.send(piece)
    host.settle()
    frames = len(host.controller.frames) + host.controller.answer_frames
    assert len(host.controller.sent) == 128 and frames <= 0.3 * 128


def test_the_next_chain_is_queued_ahead(host: Host) -> None:
    """At every wait at least half a chain is queued beyond what was answered."""
    with host.model.context([1, 2, 3]) as context:
        stream = context.generate_tokens(200)
        for taken in range(1, 201 - 32):
            next(stream)
            host.runtime.connection.flush()
            host.settle()
            assert host.controller.samples - taken >= 15
        assert len(list(stream)) == 32
    queued = [samples(frame) for frame in host.controller.frames if samples(frame)]
    assert queued == [32, 32, 32, 32, 32, 32, 8]


def test_no_more_than_asked_for_is_computed(host: Host) -> None:
    with host.model.context([1, 2, 3]) as context:
        list(context.generate_tokens(37))
        host.settle()
    assert host.controller.samples == 37
    assert sum(f.inputs[2] for f in host.controller.of(abi.Forward)) == 3 + 36


def test_a_chain_has_one_token_handle_and_one_embed(host: Host) -> None:
    """So it cannot run into the caps on them, however long it is."""
    with host.model.context([1, 2, 3]) as context:
        list(context.generate_tokens(100))
    assert len({c.token for c in host.controller.of(abi.Sample)}) == 1
    assert len(host.controller.of(abi.AllocEmb)) == 2  # the prompt's and the steps'


def test_the_first_token_and_the_last_do_not_wait_for_others(host: Host) -> None:
    with host.model.context([1, 2, 3]) as context:
        list(context.generate_tokens(40))
        list(context.generate_tokens(1))
    lazy = [c.lazy for c in host.controller.of(abi.Sample)]
    assert lazy == [False, *[True] * 38, False, False]
