"""`with` and `async with` give back the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from inferlet import HandleError, Model, http_get, spawn, subscribe
from scripted import Host
from scripted_device import continuation
from scripted_services import Site

PROMPT = list(b"The capital of France is")


def test_a_context_and_a_queue(host: Host) -> None:
    async def main() -> list[int]:
        async with host.model.context(PROMPT) as context:
            tokens = [token async for token in context.generate_tokens(5)]
        async with host.model.queue() as queue:
            sampled = queue.sample(queue.forward(queue.embed_txt(PROMPT)))
            assert await sampled == tokens[0]
        for use in (context.fork, lambda: queue.alloc_kvpage(1)):
            with pytest.raises(HandleError):
                use()
        return tokens

    assert asyncio.run(main()) == continuation(PROMPT, 5)
    host.settle()
    controller = host.controller
    assert not controller.queues and not controller.kv and not controller.embs


def test_it_is_given_back_whatever_ends_the_block(host: Host) -> None:
    async def main() -> None:
        async with host.model.context(PROMPT) as context:
            await anext(context.generate_tokens(50))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(main())
    host.settle()
    assert not host.controller.queues and not host.controller.kv


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize(
    "make",
    [
        Model.context,
        Model.queue,
        lambda _: spawn(),
        lambda _: subscribe("t"),
        lambda _: http_get("https://a"),
    ],
)
def test_both_colours_do_the_same(attached: Host, make: Callable[[Model], Any], way: str) -> None:
    controller = attached.controller
    services = controller.services
    services.programs[""] = lambda child, message: None
    services.web["https://a"] = Site(parts=[b"x"])
    held = (controller.queues, services.children, services.subscriptions, services.streams)

    async def enter() -> None:
        async with make(attached.model) as entered:
            assert entered is not None
            attached.settle()
            assert any(held)

    if way == "async":
        asyncio.run(enter())
    else:
        with make(attached.model) as entered:
            assert entered is not None
            attached.settle()
            assert any(held)
    attached.settle()
    assert not any(held)
