"""Forks, joins and several generations at once."""

from __future__ import annotations

import asyncio
import math

import pytest
from inferlet import (
    ArgumentError,
    Context,
    HandleError,
    abi,
    best_of,
    generate_all,
    interleave,
)
from inferlet.errors import QuotaError
from scripted import Host
from scripted_device import PAGE_SIZE, continuation

PROMPT = list(range(3 * PAGE_SIZE + 5))


def text(tokens: list[int]) -> str:
    return bytes(tokens).decode()


def test_many_forks_at_once_share_and_wait_once(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        next(context.generate_tokens(1))
        host.settle()
        frames, held = len(host.controller.frames), host.controller.pages_held
        forks = context.fork(5)
        assert len(host.controller.frames) - frames == 2
        assert host.controller.pages_held - held == 5, "one page each"
        for i, fork in enumerate(forks):
            fork.fill([i])
        for i, fork in enumerate(forks):
            assert list(fork.generate_tokens(3)) == continuation([*context.tokens, i], 3)
        for n in (0, -1, 257):
            with pytest.raises(ArgumentError, match="n is"):
                context.fork(n)


def test_a_shared_page_is_copied_once(host: Host) -> None:
    with host.model.context(PROMPT) as context, context.fork() as fork:
        context.trim(PAGE_SIZE + 3)
        for i in range(3):
            next(context.generate_tokens(1))
            context.fill([i])
        host.settle()
        lengths = [c.source[2] for c in host.controller.of(abi.CopyKvPage)]
        assert lengths == [4, 2], "for the fork, and before the first write"
        assert list(fork.generate_tokens(2)) == continuation(PROMPT, 2)


def test_a_fork_that_has_no_pages_left_fails_and_the_context_goes_on() -> None:
    host = Host(kv_pages=8)
    with host.model.context(PROMPT) as context:
        next(context.generate_tokens(1))
        with pytest.raises(QuotaError):
            context.fork(9)
        assert list(context.generate_tokens(3)) == continuation(context.tokens[:-3] or [], 3)
    host.close()


def test_join_keeps_one_branch_and_frees_the_others(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        forks = context.fork(3)
        for i, fork in enumerate(forks):
            fork.fill([i])
            list(fork.generate_tokens(4))
        kept = forks[1].tokens
        context.join(forks[1])
        assert context.tokens == kept == [*PROMPT, 1, *continuation([*PROMPT, 1], 4)]
        assert list(context.generate_tokens(5)) == continuation(kept, 5)
        assert (
            context.stats.generated_tokens == 9 and context.stats.prompt_tokens == len(PROMPT) + 1
        )
        with pytest.raises(HandleError, match="the context was closed"):
            forks[1].fill([3])
        for fork in forks:
            fork.close()
        host.settle()
        assert host.controller.pages_held == context.stats.pages
        for wrong in (context, "fork"):
            with pytest.raises(ArgumentError, match="another context"):
                context.join(wrong)  # type: ignore[arg-type]


def test_a_branch_can_be_appended_instead(host: Host) -> None:
    with host.model.context(PROMPT) as context, context.fork() as branch:
        said = list(branch.generate_tokens(4))
        context.fill([1, 2])
        context.fill(branch.tokens[len(PROMPT) :])
        assert context.tokens == [*PROMPT, 1, 2, *said]


def test_generations_in_turn_share_frames(host: Host) -> None:
    prompts = [[i, 2, 3] for i in range(6)]
    contexts = [host.model.context(prompt) for prompt in prompts]
    streams = [context.generate_tokens(40 + i) for i, context in enumerate(contexts)]
    got: dict[int, list[int]] = {i: [] for i in range(6)}
    order = []
    for which, token in interleave(streams):
        got[which].append(token)
        order.append(which)
    assert [got[i] for i in range(6)] == [continuation(p, 40 + i) for i, p in enumerate(prompts)]
    assert order[:12] == [*range(6), *range(6)]
    # the first steps of all left together
    first = next(f for f in host.controller.frames if any(isinstance(c, abi.Sample) for c in f))
    assert len({c.queue for c in first if isinstance(c, abi.Sample)}) == 6


def test_steps_that_are_looked_at_one_by_one_share_frames_too(host: Host) -> None:
    contexts = [host.model.context([i, 2, 3]) for i in range(4)]
    before = len(host.controller.frames)
    texts = generate_all(contexts, 10, sampler=lambda distribution: distribution.argmax())
    assert texts == [text(continuation([i, 2, 3], 10)) for i in range(4)]
    host.settle()
    assert len(host.controller.frames) - before <= 12


def test_leaving_all_early_closes_all(host: Host) -> None:
    contexts = [host.model.context([i, 2, 3]) for i in range(3)]
    streams = [context.generate_tokens(100) for context in contexts]
    for which, _ in interleave(streams):
        if which == 1:
            break
    del which
    for i, context in enumerate(contexts):
        rest = continuation(context.tokens, 5)
        assert list(context.generate_tokens(5)) == rest, i
    with pytest.raises(ArgumentError, match="a stream"):
        list(interleave([contexts[0]]))  # type: ignore[arg-type]


def test_under_asyncio_tasks_share_frames(host: Host) -> None:
    contexts = [host.model.context([i, 2, 3]) for i in range(5)]

    async def one(context: Context) -> str:
        return "".join([piece async for piece in context.generate(20)])

    async def main() -> list[str]:
        return await asyncio.gather(*map(one, contexts))

    texts = asyncio.run(main())
    assert texts == [text(continuation([i, 2, 3], 20)) for i in range(5)]
    first = next(f for f in host.controller.frames if any(isinstance(c, abi.Sample) for c in f))
    assert len({c.queue for c in first if isinstance(c, abi.Sample)}) == 5


def test_best_of_takes_the_most_probable_branch(host: Host) -> None:
    # the scripted log-probability of token t is -t, so the branch of low letters wins
    with host.model.context(PROMPT) as context:
        best = best_of(context, 3, 4, seed=7)
        expected = continuation(PROMPT, 4)
        assert best == (text(expected), -sum(expected) / 4)
        assert context.tokens == PROMPT + expected
        seeds = {c.seed for c in host.controller.of(abi.Sample)}
        assert seeds == {7, 8, 9}
        assert {c.temperature for c in host.controller.of(abi.Sample)} == {1.0}
        host.settle()
        assert host.controller.pages_held == context.stats.pages

    tokens = iter([120, 99, 110] * 4)  # each branch has a letter of its own
    with host.model.context(PROMPT) as context:
        best = best_of(context, 3, 4, constraint=lambda _: [next(tokens)])
        assert best == ("cccc", -99.0)
        assert context.text.endswith("cccc")


def test_best_of_refuses_before_it_begins(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        with pytest.raises(ArgumentError, match="the same"):
            best_of(context, 2, temperature=0.0)
        with pytest.raises(ArgumentError, match="n is 0"):
            best_of(context, 0)
        with pytest.raises(ArgumentError, match="top_p"):
            best_of(context, 2, top_p=3.0)
        assert context.tokens == PROMPT
        best = best_of(context, 2, 5, constraint=lambda _: [257])
        assert best == ("", -math.inf) and context.tokens == PROMPT
