"""`generate` with a sampler: a function of the program that picks each token."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import pytest
from inferlet import ArgumentError, Distribution, abi, mirostat, typical
from prompts import PROMPT
from scripted import Host
from scripted_device import EOS, VOCAB_SIZE, continuation


def test_a_sampler_picks_each_token(host: Host) -> None:
    asked: list[int] = []

    def second(distribution: Distribution) -> int:
        asked.append(len(distribution))
        return int(distribution.ids[1])

    with host.model.context(PROMPT) as context:
        tokens = list(context.generate_tokens(6, sampler=second, k=5))
        expected = list(PROMPT)
        for _ in range(6):
            expected += [continuation(expected, 1)[0] + 1]
        assert context.tokens == expected and tokens == expected[len(PROMPT) :]
    assert asked == [5] * 6 and not host.controller.of(abi.Sample)


def test_a_sampler_may_end_the_text_and_go_on_later(host: Host) -> None:
    picks: list[int | None] = [97, 98, None, 99, EOS]
    with host.model.context(PROMPT) as context:
        stream = context.generate(9, sampler=lambda _: picks.pop(0), logprobs=True)
        assert "".join(stream) == "ab" and stream.finish_reason == "stop"
        assert len(stream.logprobs) == 2
        stream = context.generate(9, sampler=lambda _: picks.pop(0))
        assert "".join(stream) == "c" and stream.finish_reason == "stop"
        assert context.text.endswith("abc")
        assert list(context.generate_tokens(2)) == continuation(context.tokens[:-2], 2)


def test_logprobs_of_a_sampler_are_those_of_the_distribution(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        first = continuation(PROMPT, 1)[0]
        picks = [first + 2, first]
        stream = context.generate_tokens(2, sampler=lambda _: picks.pop(0), k=3, logprobs=True)
        next(stream)
        assert stream.logprobs == [math.log(0.125)]
        stream = context.generate_tokens(1, sampler=lambda _: 200, k=3, logprobs=True)
        list(stream)
        assert math.isnan(stream.logprobs[0])


@pytest.mark.parametrize("wrong", [-1, VOCAB_SIZE, "a", 1.5])
def test_a_sampler_that_gives_no_token_ends_it_with_an_error(host: Host, wrong: Any) -> None:
    with host.model.context(PROMPT) as context:
        stream = context.generate_tokens(9, sampler=lambda _: wrong)
        with pytest.raises(ArgumentError, match="the sampler's token"):
            next(stream)
        assert stream.finish_reason == "error" and context.tokens == PROMPT
        assert list(context.generate_tokens(3)) == continuation(PROMPT, 3)


def test_a_sampler_under_asyncio_that_is_given_up(host: Host) -> None:
    """A task that is cancelled while it waits leaves a context that can go on."""

    async def main() -> list[int]:
        with host.model.context(PROMPT) as context:
            stream = context.generate_tokens(9, sampler=lambda d: d.argmax())
            got = [await anext(stream)]
            task = asyncio.create_task(anext(stream))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            got.append(await anext(stream))
            stream.close()
            return got + list(context.generate_tokens(3))

    assert asyncio.run(main()) == continuation(PROMPT, 5)


# --- the samplers that come along ----------------------------------------------------------------


def distribution(probs: list[float]) -> Distribution:
    return Distribution(
        np.arange(100, 100 + len(probs), dtype=np.uint32), np.array(probs, dtype=np.float32)
    )


def test_mirostat_keeps_to_its_surprise() -> None:
    flat = distribution([1 / 64] * 64)  # 6 bits each
    peaked = distribution([0.5, 0.25, 0.125, 0.125])
    assert {mirostat(tau=1.0, seed=i)(peaked) for i in range(50)} <= {100, 101}
    sample = mirostat(tau=3.0, eta=1.0, seed=1)
    assert len({sample(flat) for _ in range(5)}) >= 1
    assert sample(flat) == 100, "too much surprise so far: only the first is left"
    one, other = mirostat(seed=5), mirostat(seed=5)
    assert [one(flat) for _ in range(20)] == [other(flat) for _ in range(20)]
    for wrong in ({"tau": 0.0}, {"eta": float("nan")}, {"seed": -1}):
        with pytest.raises(ArgumentError):
            mirostat(**wrong)


def test_typical_leaves_out_what_is_too_probable_as_well() -> None:
    # entropy 1.8 bits: the tokens of 2 bits are nearest to it, then that of 1
    peaked = distribution([0.5, 0.15, 0.15, 0.1, 0.1])
    drawn = {typical(mass=0.3, seed=i)(peaked) for i in range(60)}
    assert drawn == {101, 102}
    drawn = {typical(mass=1.0, seed=i)(peaked) for i in range(200)}
    assert drawn == {100, 101, 102, 103, 104}
    with pytest.raises(ArgumentError, match="mass"):
        typical(mass=1.5)
