"""What else `generate` can be told: predicates, log-probabilities, penalties; wrong options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from inferlet import ArgumentError, QuotaError, abi
from prompts import PROMPT
from scripted import Host
from scripted_device import continuation

# --- predicates, log-probabilities, penalties ----------------------------------------------------


def test_stop_when_sees_all_text_and_keeps_the_piece(host: Host) -> None:
    expected = bytes(continuation(PROMPT, 80)).decode()
    texts = []

    def enough(text: str) -> bool:
        texts.append(text)
        return len(text) >= 37

    with host.model.context(PROMPT) as context:
        stream = context.generate(80, stop_when=enough, stop_strings=["never"])
        assert "".join(stream) == expected[:37] and stream.finish_reason == "stop"
        assert texts == [expected[:i] for i in range(1, 38)]
        assert context.text.endswith(expected[:37])
        assert list(context.generate_tokens(3)) == continuation(context.tokens[:-3], 3)


def test_stop_when_is_no_tax(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        "".join(context.generate(128, stop_when=lambda text: False))
    host.settle()
    assert len(host.controller.frames) <= 0.15 * 128


def test_logprobs_come_with_the_tokens(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        stream = context.generate(50, logprobs=True)
        next(stream)
        assert len(stream.logprobs) == 1
        "".join(stream)
        assert stream.logprobs == [-float(t) for t in continuation(PROMPT, 50)]
        frames = len(host.controller.frames)
        assert frames <= 0.3 * 50
        assert context.generate(5).logprobs == []


def test_penalties_have_a_history_of_the_right_tokens(host: Host) -> None:
    with host.model.context([*PROMPT, *PROMPT]) as context:
        kept = [context.generate_tokens(3, presence_penalty=1.0)]
        list(kept[-1])
        kept.append(context.generate_tokens(3, repetition_penalty=1.5, frequency_penalty=0.5))
        list(kept[-1])
        list(context.generate_tokens(3))
        host.settle()
        first, second = host.controller.of(abi.AllocHistory)
        assert first.prompt == []
        assert set(second.prompt) == set(context.tokens[:-6]) and len(set(second.prompt)) == len(
            second.prompt
        )
        assert not host.controller.histories, "freed at the end of each generation"
        penalized = [c.history is not None for c in host.controller.of(abi.Sample)]
        assert penalized == [True] * 6 + [False] * 3


def test_a_penalty_makes_no_token_come_twice(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        tokens = list(context.generate_tokens(60, frequency_penalty=2.0))
        assert len(set(tokens)) == 60
        assert len(host.controller.frames) <= 0.3 * 60


def test_a_history_beyond_the_quota_fails_and_the_context_goes_on(
    make_host: Callable[..., Host],
) -> None:
    host = make_host(history=10)
    with host.model.context(PROMPT[:4]) as context:
        host.controller.fail_next = (abi.AllocHistory, QuotaError("too long", "shorten"))
        with pytest.raises(QuotaError):
            list(context.generate_tokens(3, repetition_penalty=2.0))
        assert list(context.generate_tokens(3)) == continuation(PROMPT[:4], 3)


# --- wrong ones ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temprature": 1.0}, "no option 'temprature'"),
        ({"sampler": 5}, "sampler is 5"),
        ({"constraint": [1]}, "constraint is"),
        ({"stop_when": "x"}, "stop_when is"),
        ({"stop_strings": "x"}, "stop_strings is"),
        ({"stop_strings": [3]}, "a stop string is 3"),
        ({"k": 5}, "no sampler"),
        ({"sampler": len, "k": 0}, "k is 0"),
        ({"sampler": len, "temperature": 1.0}, "temperature for another way"),
        ({"stop": "x"}, "stop is"),
        ({"bias": [3]}, "bias is"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
    ],
)
def test_wrong_options_say_what_to_try(host: Host, options: dict[str, Any], says: str) -> None:
    with host.model.context(PROMPT) as context:
        with pytest.raises(ArgumentError, match=says) as caught:
            context.generate(3, **options)
        assert caught.value.hint
        assert list(context.generate_tokens(3)) == continuation(PROMPT, 3)


def test_options_that_are_off_may_be_given_with_a_sampler(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        stream = context.generate_tokens(
            3, sampler=lambda d: d.argmax(), temperature=0.0, seed=None, top_p=1.0, k=10**6
        )
        assert list(stream) == continuation(PROMPT, 3)
        with pytest.raises(ArgumentError, match="stop_strings"):
            context.generate_tokens(3, stop_strings=["a"])  # type: ignore[call-arg]


def test_what_a_function_raises_comes_out_and_costs_nothing(host: Host) -> None:
    def wrong(_: object) -> Any:
        raise ZeroDivisionError

    with host.model.context(PROMPT) as context:
        list(context.generate_tokens(3))
        tokens, inputs = context.tokens, len(host.controller.of(abi.Forward))
        for options in ({"sampler": wrong}, {"constraint": wrong}, {"stop_when": wrong}):
            stream = context.generate(5, **options)  # type: ignore[arg-type]
            with pytest.raises(ZeroDivisionError):
                "".join(stream)
            assert stream.finish_reason == "error"
            context.trim(len(tokens))
        assert list(context.generate_tokens(2)) == continuation(tokens, 2)
        again = [f.inputs[2] for f in host.controller.of(abi.Forward)[inputs:]]
        assert max(again) == 1, "the prompt is not computed again"
