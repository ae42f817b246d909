"""What `generate` can be told: samplers, constraints, predicates, penalties, log-probabilities."""

from __future__ import annotations

import asyncio
import math
import string
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from inferlet import (
    END,
    ArgumentError,
    Distribution,
    MaskError,
    QuotaError,
    abi,
    characters,
    choice,
    generate_all,
    mirostat,
    typical,
)
from inferlet.constraints import OctetAutomaton
from scripted import Host
from scripted_device import EOS, VOCAB_SIZE, continuation

PROMPT = list(b"The capital of France is")
EURO_HEAD = 258  # the token of the first two octets of a euro sign


# --- samplers ------------------------------------------------------------------------------------


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


# --- constraints ---------------------------------------------------------------------------------


def bits(tokens: list[int]) -> bytes:
    array = np.zeros(VOCAB_SIZE, np.bool_)
    array[tokens] = True
    return np.packbits(array, bitorder="little").tobytes()


def as_array(tokens: list[int]) -> Any:
    array = np.zeros(VOCAB_SIZE, np.bool_)
    array[tokens] = True
    return array


@pytest.mark.parametrize(
    "form", [list, tuple, iter, np.array, as_array, bits, lambda t: bytearray(bits(t))]
)
def test_a_constraint_may_say_it_in_many_forms(host: Host, form: Callable[[Any], Any]) -> None:
    lengths = []

    def allowed(tokens: list[int]) -> Any:
        lengths.append(len(tokens))
        return form([65 + len(tokens)])

    with host.model.context(PROMPT) as context:
        assert "".join(context.generate(5, constraint=allowed)) == "ABCDE"
        assert lengths == [0, 1, 2, 3, 4]
        assert list(context.generate_tokens(3)) == continuation(context.tokens[:-3], 3)


def test_none_allows_all_and_end_ends(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        stream = context.generate_tokens(
            9, constraint=lambda tokens: END if len(tokens) == 4 else None
        )
        assert list(stream) == continuation(PROMPT, 4)
        assert stream.finish_reason == "stop"
        stream = context.generate_tokens(9, constraint=lambda _: END)
        assert list(stream) == [] and stream.finish_reason == "stop"
        assert list(context.generate_tokens(3)) == continuation(context.tokens[:-3], 3)


@pytest.mark.parametrize("nothing", [[], b"\0" * 33, np.zeros(VOCAB_SIZE, np.bool_)])
def test_a_dead_end_is_an_error_that_says_so(host: Host, nothing: Any) -> None:
    with host.model.context(PROMPT) as context:
        stream = context.generate(9, constraint=lambda t: None if len(t) < 2 else nothing)
        with pytest.raises(MaskError, match="allows no token after 2 generated ones"):
            "".join(stream)
        assert stream.finish_reason == "error"
        assert context.tokens == PROMPT + continuation(PROMPT, 2)
        assert list(context.generate_tokens(3)) == continuation(context.tokens[:-3], 3)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (5, ArgumentError),
        ("abc", ArgumentError),
        ([VOCAB_SIZE], ArgumentError),
        ([-1], ArgumentError),
        (["a"], ArgumentError),
        (b"\1", MaskError),
        (np.ones(5, np.bool_), MaskError),
        (np.ones((2, VOCAB_SIZE), np.bool_), MaskError),
        (np.ones(3), ArgumentError),
    ],
)
def test_what_a_constraint_may_not_say(host: Host, wrong: Any, error: type[Exception]) -> None:
    with host.model.context(PROMPT) as context:
        with pytest.raises(error):
            list(context.generate_tokens(3, constraint=lambda _: wrong))
        assert list(context.generate_tokens(3)) == continuation(PROMPT, 3)


def test_a_choice_is_one_of_its_strings(host: Host) -> None:
    strings = ["red", "reddish", "green", "gr€", "€"]
    seen = set()
    for i in range(40):
        with host.model.context([i, *PROMPT]) as context:
            stream = context.generate(50, constraint=choice(host.model, strings))
            text = "".join(stream)
            seen.add(text)
            assert text in strings and stream.finish_reason == "stop"
            assert context.tokens[-1] != EOS
    assert len(seen) >= 3


def allowed_after(constraint: OctetAutomaton, octets: bytes, *tokens: int) -> set[int]:
    mask = constraint([*octets, *tokens])
    assert isinstance(mask, bytes)
    flags = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    return {int(t) for t in flags.nonzero()[0]}


def test_choices_go_on_inside_of_tokens_and_characters(host: Host) -> None:
    constraint = choice(host.model, ["a€", "ab", "a"])
    assert allowed_after(constraint, b"") == {97}
    # the first two octets of a euro sign are a token of their own, and its octets are too
    assert allowed_after(constraint, b"a") == {0xE2, EURO_HEAD, 98, EOS}
    assert allowed_after(constraint, b"a", EURO_HEAD) == {0xAC}
    assert allowed_after(constraint, b"a\xe2") == {0x82}
    assert constraint([97, 98]) is END
    assert constraint([97, EURO_HEAD, 0xAC]) is END
    other = choice(host.model, ["\u2200"])  # begins with the same octet as the euro sign
    assert allowed_after(other, b"") == {0xE2}
    with pytest.raises(ArgumentError, match="not what the constraint allowed"):
        constraint([100])


def test_characters_of_a_class(host: Host) -> None:
    constraint = characters(host.model, string.digits + "€£", least=2)
    digits = {*string.digits.encode()}
    start = {*digits, 0xE2, EURO_HEAD, 0xC2}
    assert allowed_after(constraint, b"") == start
    assert allowed_after(constraint, b"1") == start
    assert allowed_after(constraint, b"", EURO_HEAD) == {0xAC}
    assert allowed_after(constraint, "1£".encode()) == start | {EOS}
    assert allowed_after(constraint, b"11\xe2") == {0x82}
    assert EOS in allowed_after(characters(host.model, "x", least=0), b"")
    with host.model.context(PROMPT) as context:
        stream = context.generate(31, constraint=constraint)
        text = "".join(stream)
        assert stream.finish_reason == "length" and len(stream.tokens.generated) == 31
        assert len(text) >= 15 and set(text[:-1]) <= set(string.digits + "€£")


def test_wrong_choices_are_refused(host: Host) -> None:
    for wrong in ([], "yes", [""], [1], None):
        with pytest.raises(ArgumentError):
            choice(host.model, wrong)  # type: ignore[arg-type]
    for wrong in ("", None, ["1"]):
        with pytest.raises(ArgumentError):
            characters(host.model, wrong)  # type: ignore[arg-type]
    host.runtime.startup.models[0].eos_tokens = []
    with pytest.raises(ArgumentError, match="no token says that it ends"):
        choice(host.model, ["a", "ab"])
    assert choice(host.model, ["a", "b"])([97]) is END
    assert EOS in allowed_after(choice(host.model, ["a", "ab"], stop=[EOS]), b"a")


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


def test_a_closed_context_says_so(host: Host) -> None:
    context = host.model.context(PROMPT)
    context.close()
    context.close()
    for call in (context.fork, lambda: context.fill([1]), lambda: context.generate(3)):
        with pytest.raises(Exception, match="the context was closed"):
            call()
    assert context.tokens == PROMPT and context.text == bytes(PROMPT).decode()


# --- resources -----------------------------------------------------------------------------------


@pytest.mark.parametrize("embeds", [2, 3, 10, 100])
def test_a_small_quota_of_embeds_is_enough_for_a_long_prompt(
    make_host: Callable[..., Host], embeds: int
) -> None:
    host = make_host(embeds=embeds)
    most = 0
    alloc = host.controller._AllocEmb

    def counted(command: abi.AllocEmb) -> None:
        nonlocal most
        alloc(command)
        most = max(most, sum(map(len, host.controller.embs.values())))

    host.controller._AllocEmb = counted  # type: ignore[assignment,method-assign]
    prompt = [i % 250 for i in range(300)]
    with host.model.context(prompt) as context:
        assert list(context.generate_tokens(3)) == continuation(prompt, 3)
        context.fill(prompt[:50])
        assert list(context.generate_tokens(3)) == continuation(context.tokens[:-3], 3)
    assert most <= embeds


def test_many_prompts_at_once_keep_to_the_quota_of_embeds(
    make_host: Callable[..., Host],
) -> None:
    host = make_host(embeds=40)
    prompts = [[i] + [j % 250 for j in range(150)] for i in range(12)]
    contexts = [host.model.context(prompt) for prompt in prompts]
    texts = generate_all(contexts, 5)
    assert texts == [bytes(continuation(prompt, 5)).decode() for prompt in prompts]


def test_a_small_quota_of_commands_gives_short_chains(make_host: Callable[..., Host]) -> None:
    host = make_host(commands=60)
    with host.model.context(PROMPT) as context:
        assert list(context.generate_tokens(50)) == continuation(PROMPT, 50)
    for frame in host.controller.frames:
        assert sum(isinstance(c, abi.Sample) for c in frame) <= 10
    assert not any(c.lazy for c in host.controller.of(abi.Sample))


def test_stats_count(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        assert context.stats.first_token_seconds is None and context.stats.pages == 0
        list(context.generate_tokens(5))
        context.rewind(5)
        list(context.generate_tokens(10))
        stats = context.stats
        assert (stats.prompt_tokens, stats.generated_tokens) == (len(PROMPT), 15)
        assert stats.first_token_seconds is not None and stats.first_token_seconds > 0
        assert stats.tokens_per_second is not None and stats.tokens_per_second > 0
        host.settle()
        assert stats.pages == host.controller.pages_held and stats.shared_pages == 0
        with context.fork() as fork:
            full = (len(context) - 1) // 8
            assert fork.stats.shared_pages == context.stats.shared_pages == full
            assert fork.stats.pages == full + 1


def test_chat_fills_with_the_models_template(host: Host) -> None:
    with host.model.context() as context:
        context.chat([{"role": "user", "content": "hi"}])
        assert context.text == "[user]hi[assistant]"
        list(context.generate_tokens(2))
        context.chat([{"role": "user", "content": "so?"}], generation_prompt=False)
        assert context.text.endswith("[user]so?")
        with pytest.raises(ArgumentError):
            context.chat("hi")  # type: ignore[arg-type]


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
