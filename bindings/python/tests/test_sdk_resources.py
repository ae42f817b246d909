"""Contexts: what they take of their inferlet's quotas and tell of it, chats, their end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from inferlet import ArgumentError, abi, generate_all
from prompts import PROMPT
from scripted import Host
from scripted_device import continuation


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


def test_a_closed_context_says_so(host: Host) -> None:
    context = host.model.context(PROMPT)
    context.close()
    context.close()
    for call in (context.fork, lambda: context.fill([1]), lambda: context.generate(3)):
        with pytest.raises(Exception, match="the context was closed"):
            call()
    assert context.tokens == PROMPT and context.text == bytes(PROMPT).decode()
