"""A sampler and a constraint together: the sampler gets what the constraint allows."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import pytest
from inferlet import (
    END,
    ArgumentError,
    Distribution,
    MaskError,
    abi,
    characters,
    choice,
    mirostat,
    typical,
)
from scripted import Host
from scripted_device import VOCAB_SIZE, continuation

PROMPT = list(b"The capital of France is")
# what the scripted model gives: ids that ascend from the most probable, each half as probable as
# the one before
FIRST = continuation(PROMPT, 1)[0]


def test_the_sampler_gets_what_is_allowed_and_adds_up_to_one(host: Host) -> None:
    seen: list[Any] = []

    def last(distribution: Distribution) -> int:
        seen.append((distribution.ids.tolist(), distribution.probs.tolist()))
        assert distribution.ids.dtype == np.uint32 and distribution.probs.dtype == np.float32
        return int(distribution.ids[-1])

    with host.model.context(PROMPT) as context:
        stream = context.generate_tokens(
            1, sampler=last, k=4, constraint=lambda _: [FIRST + 3, FIRST + 1, 5], logprobs=True
        )
        assert list(stream) == [FIRST + 3] and context.tokens == [*PROMPT, FIRST + 3]
    assert seen == [([FIRST + 1, FIRST + 3], pytest.approx([0.8, 0.2]))]
    # by the model's own softmax, as without a constraint
    assert stream.logprobs == [math.log(2.0**-4)]
    assert not host.controller.of(abi.Sample)


def test_each_step_has_the_constraint_s_mask_for_it(host: Host) -> None:
    def step(tokens: list[int]) -> Any:
        return [None, list(range(97, 110)), np.arange(VOCAB_SIZE) > 200, END][len(tokens)]

    with host.model.context(PROMPT) as context:
        stream = context.generate_tokens(
            9, sampler=lambda d: d.argmax(), k=VOCAB_SIZE, constraint=step
        )
        tokens = list(stream)
        assert stream.finish_reason == "stop" and tokens[0] == FIRST
        second = continuation([*PROMPT, FIRST], 1)[0]
        assert tokens[1] == (second if second < 110 else 97)
        assert tokens[2] == 201
        assert list(context.generate_tokens(2)) == continuation([*PROMPT, *tokens], 2)


@pytest.mark.parametrize("sampler", [lambda d: d.argmax(), mirostat(seed=1), typical(seed=1)])
def test_ready_made_ones_go_together(host: Host, sampler: Any) -> None:
    capitals = [" Paris", " Rome", " Vienna"]
    with host.model.context(PROMPT) as context:
        stream = context.generate(
            20, sampler=sampler, k=VOCAB_SIZE, constraint=choice(host.model, capitals)
        )
        assert "".join(stream) in capitals and stream.finish_reason == "stop"

    async def digits() -> str:
        async with host.model.context(PROMPT) as context:
            allowed = characters(host.model, "0123456789")
            stream = context.generate(6, sampler=sampler, k=VOCAB_SIZE, constraint=allowed, stop=[])
            return "".join([piece async for piece in stream])

    assert 1 <= len(text := asyncio.run(digits())) <= 6 and text.isdigit()


def test_none_allowed_of_the_most_probable_says_what_to_try(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        stream = context.generate_tokens(
            3, sampler=lambda d: d.argmax(), k=4, constraint=lambda _: [FIRST + 4]
        )
        with pytest.raises(MaskError, match="none of the 4 most probable tokens") as caught:
            next(stream)
        assert "larger k" in caught.value.hint and "no sampler" in caught.value.hint
        assert stream.finish_reason == "error" and context.tokens == PROMPT
        # what the hint says
        retries: list[Any] = [{"sampler": lambda d: d.argmax(), "k": 5}, {}]
        for options in retries:
            allowed = context.generate_tokens(1, constraint=lambda _: [FIRST + 4], **options)
            assert list(allowed) == [FIRST + 4]
            context.trim(len(PROMPT))


def test_tokens_too_improbable_to_tell_apart_are_even(host: Host) -> None:
    seen: list[float] = []

    def look(distribution: Distribution) -> int:
        seen.extend(distribution.probs.tolist())
        return distribution.argmax()

    far = [(FIRST + 200) % VOCAB_SIZE, (FIRST + 201) % VOCAB_SIZE]
    with host.model.context(PROMPT) as context:
        list(context.generate_tokens(1, sampler=look, k=VOCAB_SIZE, constraint=lambda _: far))
    assert seen == [0.5, 0.5]


def test_a_sampler_cannot_go_round_the_constraint(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        stream = context.generate_tokens(
            3, sampler=lambda _: FIRST, k=4, constraint=lambda _: [FIRST + 1, 7]
        )
        with pytest.raises(ArgumentError, match=f"token is {FIRST}, which the constraint does not"):
            next(stream)
        # but may take what is allowed and not among the most probable
        outside = context.generate_tokens(
            1, sampler=lambda _: 7, k=4, constraint=lambda _: [FIRST + 1, 7]
        )
        assert list(outside) == [7]
        ends = context.generate_tokens(3, sampler=lambda _: None, k=4, constraint=lambda _: None)
        assert list(ends) == [] and ends.finish_reason == "stop"
