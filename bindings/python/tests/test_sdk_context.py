"""Context keeps tokens and KV slots in step, whatever is done to it."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inferlet import ArgumentError, Context, PositionError, QuotaError, abi
from inferlet.errors import BackendError
from scripted import Host
from scripted_device import BOS, EOS, MAX_CONTEXT, PAGE_SIZE, continuation

PROMPT = [BOS, *b"The capital of France is"]


def letters(tokens: list[int]) -> str:
    return bytes(t for t in tokens if t < 256).decode()


def test_generate_continues_the_prompt(host: Host) -> None:
    with host.model.context("The capital of France is") as context:
        assert context.tokens == PROMPT
        text = "".join(context.generate(100))
    assert text == letters(continuation(PROMPT, 100))
    assert context.tokens == PROMPT + continuation(PROMPT, 100)
    assert context.text == "The capital of France is" + text


def test_a_long_prompt_is_filled_in_forwards_of_at_most_512_inputs() -> None:
    # the scripted model's context is shorter than 512, so this one has a longer one
    host = Host()
    host.runtime.startup.models[0].max_context = 2000
    prompt = [i % 256 for i in range(1100)]
    with host.model.context(prompt) as context:
        assert list(context.generate_tokens(3)) == continuation(prompt, 3)
    sizes = [f.inputs[2] for f in host.controller.of(abi.Forward)]
    assert sizes == [512, 512, 76, 1, 1]
    host.close()


def test_a_prompt_longer_than_the_context_is_refused_before_anything_runs(host: Host) -> None:
    with pytest.raises(PositionError) as caught:
        host.model.context("x" * MAX_CONTEXT)
    assert f"{MAX_CONTEXT + 1} tokens" in caught.value.message
    assert "leave out 1 tokens" in caught.value.hint
    host.settle()
    assert not host.controller.of(abi.Forward) and not host.controller.of(abi.AllocKvPage)


def test_generation_ends_at_the_end_of_the_context(host: Host) -> None:
    prompt = [1] * (MAX_CONTEXT - 5)
    with host.model.context(prompt) as context:
        stream = context.generate_tokens(50)
        assert list(stream) == continuation(prompt, 5)
        assert stream.finish_reason == "length"
        assert len(context) == MAX_CONTEXT
        with pytest.raises(PositionError, match="full"):
            context.generate(1)
        context.trim(10)
        assert list(context.generate_tokens(2)) == continuation([1] * 10, 2)


def test_fill_and_generate_again(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        for count in (1, 7, 40):
            before = context.tokens
            assert list(context.generate_tokens(count)) == continuation(before, count)
            context.fill(" and")
            context.append(33)
        assert letters(context.tokens).endswith(" and!")


def test_a_stop_token_ends_it_and_is_not_part_of_the_context(
    make_host: Callable[..., Host],
) -> None:
    limit = len(PROMPT) + 10
    host = make_host(rule=lambda seen: EOS if len(seen) == limit else 97 + len(seen) % 26)
    with host.model.context(PROMPT) as context:
        stream = context.generate(100)
        assert len("".join(stream)) == 10
        assert stream.finish_reason == "stop"
        assert len(context) == limit
        # the stop dropped the rest: no slot was written beyond the tokens that are kept
        written = [s for pages in host.controller.kv.values() for p in pages for s in p.slots if s]
        assert sorted(s[0] for s in written) == list(range(limit))
        computed = [f.inputs[2] for f in host.controller.of(abi.Forward)]
        context.fill([98])
        next(context.generate_tokens(1, stop=[]))
        assert [f.inputs[2] for f in host.controller.of(abi.Forward)] == [*computed, 1]
        context.trim(limit)
        assert list(context.generate_tokens(5)) == []  # the same end again
        context.fill([98])
        assert list(context.generate_tokens(3, stop=[])) == [
            97 + (limit + i) % 26 for i in (1, 2, 3)
        ]


def test_own_stop_tokens(host: Host) -> None:
    expected = continuation(PROMPT, 60)
    at = next(i for i in range(20, 60) if expected[i] not in expected[:i])
    with host.model.context(PROMPT) as context:
        stop = [expected[at]]
        assert list(context.generate_tokens(60, stop=stop)) == expected[: expected.index(stop[0])]


def test_stop_strings(host: Host) -> None:
    expected = letters(continuation(PROMPT, 90))
    for begin, end in ((0, 2), (30, 33), (64, 67)):
        stop = expected[begin:end]
        with host.model.context(PROMPT) as context:
            stream = context.generate(90, stop_strings=[stop, "never this"])
            assert "".join(stream) == expected[: expected.index(stop)]
            assert stream.finish_reason == "stop"
            # the tokens of the stop string were generated, so they are part of the context
            assert context.text.endswith(stop)
            rest = continuation(context.tokens, 4)
            assert list(context.generate_tokens(4)) == rest


def test_what_only_began_like_a_stop_string_comes_out(host: Host) -> None:
    expected = letters(continuation(PROMPT, 20))
    with host.model.context(PROMPT) as context:
        stop = expected[-2:] + "!"
        assert "".join(context.generate(20, stop_strings=[stop])) == expected


@pytest.mark.parametrize("taken", [1, 5, 31, 40])
def test_leaving_early_keeps_what_was_taken(host: Host, taken: int) -> None:
    with host.model.context(PROMPT) as context:
        stream = context.generate_tokens(200)
        tokens = [next(stream) for _ in range(taken)]
        assert tokens == continuation(PROMPT, taken)
        context.fill("!")
        assert context.tokens == [*PROMPT, *tokens, 33]
        assert stream.finish_reason == "closed" and list(stream) == []
        assert list(context.generate_tokens(40)) == continuation([*PROMPT, *tokens, 33], 40)


def test_leaving_early_cancels_what_has_not_run(host: Host) -> None:
    """The second chain, its pages included, is dropped by the cancel."""
    with host.model.context(PROMPT) as context:
        list(context.generate_tokens(1))  # so that one chain is queued ahead of another
        host.controller.hold_after = 1 + 28
        stream = context.generate_tokens(300)
        tokens = [next(stream) for _ in range(20)]
        context.fill("!")
        host.settle()
        assert host.controller.of(abi.Cancel)
        assert host.controller.samples == 1 + 28
        expected = continuation(PROMPT, 21)
        assert tokens == expected[1:]
        assert context.tokens == [*PROMPT, *expected, 33]
        rest = continuation(context.tokens, 60)
        assert list(context.generate_tokens(60)) == rest


def test_pages_kept_by_leaving_early_take_no_error_away(host: Host) -> None:
    """Those that a cancel may have dropped are freed with care; the others must not be."""
    with host.model.context(PROMPT) as context:
        stream = context.generate_tokens(300)
        for _ in range(20):
            next(stream)
        context.fill("!")
        with context.fork():
            context.trim(3)
            host.controller.fail_next = (abi.AllocKvPage, QuotaError("no page is left", "free one"))
            with pytest.raises(QuotaError, match="no page is left"):
                list(context.generate_tokens(30))
        assert list(context.generate_tokens(30)) == continuation(PROMPT[:3], 30)


def test_fork_shares_full_pages_and_copies_the_last(host: Host) -> None:
    prompt = list(range(3 * PAGE_SIZE + 5))
    with host.model.context(prompt) as context:
        fork = context.fork()
        host.settle()
        shared = [p for pages in host.controller.kv.values() for p in pages if p.holders > 1]
        assert len({id(p) for p in shared}) == 3
        assert sum(c.source[2] for c in host.controller.of(abi.CopyKvPage)) == 4
        fork.fill("x")
        assert list(context.generate_tokens(20)) == continuation(prompt, 20)
        assert list(fork.generate_tokens(20)) == continuation([*prompt, ord("x")], 20)
        # the prompt was computed once
        inputs = sum(f.inputs[2] for f in host.controller.of(abi.Forward))
        assert inputs <= len(prompt) + 1 + 2 * 20


def test_a_fork_outlives_its_parent(host: Host) -> None:
    prompt = list(range(40))
    context = host.model.context(prompt)
    with context.fork() as fork:
        del context
        gc.collect()
        assert list(fork.generate_tokens(5)) == continuation(prompt, 5)


def test_trimming_into_a_shared_page_copies_it(host: Host) -> None:
    prompt = list(range(5 * PAGE_SIZE))
    with host.model.context(prompt) as context, context.fork() as fork:
        for one in (context, fork):
            one.trim(2 * PAGE_SIZE + 3)
            one.fill("y")
        expected = [*prompt[: 2 * PAGE_SIZE + 3], ord("y")]
        assert list(context.generate_tokens(10)) == continuation(expected, 10)
        assert list(fork.generate_tokens(10)) == continuation(expected, 10)


def test_trim_frees_pages(host: Host) -> None:
    with host.model.context(list(range(20 * PAGE_SIZE))) as context:
        list(context.generate_tokens(2))
        host.settle()
        before = host.controller.pages_held
        context.trim(PAGE_SIZE + 1)
        host.settle()
        assert before >= 20 and host.controller.pages_held == 2
        assert list(context.generate_tokens(3)) == continuation(range(PAGE_SIZE + 1), 3)
        with pytest.raises(ArgumentError):
            context.trim(1000)


def test_leaving_the_context_frees_everything(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        "".join(context.generate(50))
    del context
    gc.collect()
    host.settle()
    controller = host.controller
    assert not (controller.kv or controller.embs or controller.tokens or controller.queues)
    # with one command, not one for each handle
    assert not controller.of(abi.DeallocKvPage) and not controller.of(abi.DeallocToken)


def test_an_error_leaves_the_context_usable(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        host.controller.fail_next = (abi.Forward, BackendError("the step failed", "try again"))
        stream = context.generate_tokens(40)
        with pytest.raises(BackendError, match="the step failed"):
            next(stream)
        assert stream.finish_reason == "error" and list(stream) == []
        assert context.tokens == PROMPT
        assert list(context.generate_tokens(40)) == continuation(PROMPT, 40)


def test_running_out_of_pages(make_host: Callable[..., Host]) -> None:
    host = make_host(kv_pages=8)
    with host.model.context(PROMPT) as context:
        with pytest.raises(QuotaError):
            list(context.generate_tokens(200))
        kept = len(context)
        assert len(PROMPT) <= kept <= 8 * PAGE_SIZE + 1
        context.trim(len(PROMPT))
        assert list(context.generate_tokens(20)) == continuation(PROMPT, 20)


def test_bad_parameters(host: Host) -> None:
    with host.model.context() as context:
        with pytest.raises(ArgumentError, match="empty"):
            context.generate(3)
        with pytest.raises(ArgumentError, match="vocabulary"):
            context.fill([5, 100000])
        context.fill([5])
        for options in (
            {"temperature": -1.0},
            {"top_p": 0.0},
            {"min_p": 2.0},
            {"seed": -1},
            {"stop": list(range(65))},
        ):
            with pytest.raises(ArgumentError):
                context.generate(3, **options)
        with pytest.raises(ArgumentError):
            context.generate(0)
        assert context.tokens == [5]


@pytest.mark.parametrize(
    "messages", [[{"role": "user", "content": "Hi"}], {"role": "user", "content": "Hi"}]
)
def test_chat_messages_are_no_prompt(host: Host, messages: object) -> None:
    for fill in (host.model.context, host.model.context(PROMPT).fill):
        with pytest.raises(ArgumentError, match="chat messages") as caught:
            fill(messages)  # type: ignore[arg-type]
        assert "chat(messages)" in caught.value.hint


def test_sampling_parameters_arrive(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        list(context.generate_tokens(4, temperature=0.5, top_k=3, top_p=0.5, min_p=0.25, seed=9))
    for c in host.controller.of(abi.Sample):
        assert (c.temperature, c.top_k, c.top_p, c.min_p, c.seed) == (0.5, 3, 0.5, 0.25, 9)
        assert c.stop == [EOS]


_actions = st.lists(
    st.one_of(
        st.tuples(st.just("fill"), st.integers(1, 30)),
        st.tuples(st.just("generate"), st.integers(1, 45)),
        st.tuples(st.just("leave"), st.integers(1, 20)),
        st.tuples(st.just("trim"), st.integers(0, 60)),
        st.tuples(st.just("fork"), st.just(0)),
        st.tuples(st.just("drop"), st.just(0)),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(_actions, st.integers(0, 2**31))
def test_any_history_of_forks_and_trims_generates_as_from_scratch(
    actions: list[tuple[str, int]], seed: int
) -> None:
    host = Host()
    try:
        contexts: list[tuple[Context, list[int]]] = [(host.model.context([1, 2, 3]), [1, 2, 3])]
        for action, n in actions:
            seed = seed * 48271 % 0x7FFFFFFF
            context, tokens = contexts[seed % len(contexts)]
            if action == "fill" and len(tokens) + n <= MAX_CONTEXT:
                more = [(seed + i) % 256 for i in range(n)]
                context.fill(more)
                tokens += more
            elif action in ("generate", "leave") and 0 < len(tokens) < MAX_CONTEXT - 100:
                stream = context.generate_tokens(n if action == "generate" else 100)
                got = [next(stream) for _ in range(n)]
                assert got == continuation(tokens, n)
                tokens += got
            elif action == "trim":
                del tokens[n:]
                context.trim(len(tokens))
            elif action == "fork" and len(contexts) < 4:
                contexts.append((context.fork(), list(tokens)))
            elif action == "drop" and len(contexts) > 1:
                del contexts[seed % len(contexts)]
                gc.collect()
            for context, tokens in contexts:
                assert context.tokens == tokens
        for context, tokens in contexts:
            if 0 < len(tokens) < MAX_CONTEXT - 3:
                assert list(context.generate_tokens(3)) == continuation(tokens, 3)
        assert not host.controller.broken
    finally:
        host.close()
