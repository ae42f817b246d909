"""Calls that need no queue: what the inferlet is, messages, the store, listings of names."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

import pytest
from inferlet import (
    ArgumentError,
    ClosedError,
    Future,
    LaggedError,
    QuotaError,
    abi,
    broadcast,
    deadline,
    gather,
    get_instance_id,
    get_version,
    job,
    list_exported,
    quota,
    spawn,
    store_delete,
    store_exists,
    store_get,
    store_list,
    store_set,
    subscribe,
    time_left,
    user,
)
from scripted import Host


def test_what_an_inferlet_knows_of_itself(attached: Host) -> None:
    assert (get_version(), get_instance_id(), user(), job()) == ("1.2.3", "test", "ann", "night")
    assert deadline() is None and time_left() is None
    assert quota().result() == {"kv_pages": 1000, "cpu_seconds": 1.5}


def test_time_left_ends_at_0(make_host: Callable[..., Host]) -> None:
    assert make_host(deadline=time.time() - 5).runtime.time_left() == 0
    left = make_host(deadline=time.time() + 1000).runtime.time_left()
    assert left is not None and 0 < left <= 1000


# --- messages ------------------------------------------------------------------------------------


def test_broadcast_reaches_subscriptions(attached: Host) -> None:
    news, more = subscribe("news"), subscribe("news")
    other, jobs = subscribe("other"), subscribe("news", job=True)
    assert broadcast("news", "h\u00e9").result() == 2
    assert broadcast("news", b"\xff", job=True).result() == 1
    first = news.receive().result()
    assert (first.data, first.text, first.sender) == ("h\u00e9".encode(), "h\u00e9", "test")
    assert more.receive().result() == first
    assert jobs.receive().result().text == "\ufffd"
    waits = other.receive()
    assert not waits.done()
    services = attached.controller.services
    attached.controller.next_frame.append(lambda: services.deliver("other", b"late", "else"))
    attached.settle()  # the answer is on its way already
    assert waits.result().sender == "else"


def test_messages_are_iterated_until_the_end(attached: Host) -> None:
    got = []
    with subscribe("t") as messages:
        for i in range(3):
            broadcast("t", str(i))
        for message in messages:
            got.append(message.text)
            if len(got) == 3:
                messages.unsubscribe()
        with pytest.raises(ClosedError):
            messages.receive()
    assert got == ["0", "1", "2"]
    attached.settle()
    assert not attached.controller.services.subscriptions


def test_messages_are_iterated_under_asyncio(attached: Host) -> None:
    async def listen() -> list[str]:
        got = []
        with subscribe("t") as messages:
            await messages.subscribed
            listening.set()
            async for message in messages:
                got.append(message.text)
                if message.text == "end":
                    return got
        raise AssertionError

    async def both() -> list[str]:
        task = asyncio.create_task(listen())
        await listening.wait()
        for text in ("a", "b", "end"):
            await broadcast("t", text)
        return await task

    listening = asyncio.Event()
    assert asyncio.run(both()) == ["a", "b", "end"]


def test_a_wait_that_is_given_up_loses_no_message(attached: Host) -> None:
    async def program() -> str:
        with subscribe("t") as messages:
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(messages), 0.01)
            await broadcast("t", "the only one")
            return (await anext(messages)).text

    assert asyncio.run(program()) == "the only one"
    assert len(attached.controller.of(abi.NextMessage)) == 1


def test_unsubscribing_ends_who_waits(attached: Host) -> None:
    messages = subscribe("t")
    waits = messages.receive()
    messages.unsubscribe()
    with pytest.raises(ClosedError):
        waits.result()
    assert list(messages) == []


def test_a_subscription_ends_with_its_last_reference(attached: Host) -> None:
    waits = subscribe("t").receive()  # alive as long as somebody waits
    gc.collect()
    assert broadcast("t", "x").result() == 1
    assert waits.result().text == "x"
    gc.collect()
    assert broadcast("t", "y").result() == 0


def test_lost_messages_are_told_once(attached: Host) -> None:
    messages = subscribe("t")
    messages.subscribed.result()
    (box,) = attached.controller.services.subscriptions.values()
    box.lagged = True
    broadcast("t", "after")
    with pytest.raises(LaggedError):
        next(messages)
    assert next(messages).text == "after"


def test_one_subscription_too_many_says_so_where_it_is_used(attached: Host) -> None:
    kept = [subscribe("t") for _ in range(4)]
    with pytest.raises(QuotaError):
        subscribe("t").receive().result()
    with pytest.raises(QuotaError):
        next(subscribe("t"))
    del kept


def test_an_iteration_is_not_ended_quietly_by_the_end_of_piehost(attached: Host) -> None:
    attached.controller.ends_at = abi.NextMessage
    with pytest.raises(ClosedError, match="connection to piehost ended"):
        list(subscribe("t"))


# --- the store -----------------------------------------------------------------------------------


def test_the_store(attached: Host) -> None:
    assert store_get("k").result() is None
    nothing: Future[None] = store_set("k", "v\u00e4lue")
    assert nothing.result() is None
    store_set("empty", b"")
    assert store_get("k").result() == "v\u00e4lue".encode() and store_get("empty").result() == b""
    assert store_exists("k").result() is True and store_exists("x").result() is False
    assert store_delete("k").result() is True and store_delete("k").result() is False
    assert store_list().result() == ["empty"]


def test_all_keys_are_listed_in_both_colours(attached: Host) -> None:
    keys = [f"user:{i:02}" for i in range(10)]
    for key in [*keys, "other"]:
        store_set(key, "")
    assert store_list("user:").result() == keys == list(store_list("user:"))
    assert store_list().result() == ["other", *keys]
    assert store_list("none").result() == [] == list(store_list("none"))
    listing = store_list("user:0")
    assert next(iter(listing)) == "user:00" and listing.result() == keys

    async def program() -> tuple[list[str], list[str]]:
        return await store_list("user:"), [key async for key in store_list("user:")]

    assert asyncio.run(program()) == (keys, keys)


def test_exports_are_listed(attached: Host) -> None:
    with attached.model.queue() as q:
        kv = q.alloc_kvpage(3)
        gather(
            *[
                q.export_kvpage(f"e{i}", kv[: 8 * (i % 3 + 1)], lease=None if i else 59.5)
                for i in range(5)
            ]
        ).result()  # listing is not a call of the queue
        listed = list_exported("e").result()
        assert [(e.name, e.pages, e.exporter) for e in listed] == [
            (f"e{i}", i % 3 + 1, "test") for i in range(5)
        ]
        assert [e.seconds_left for e in listed] == [60.0, None, None, None, None]
        assert list_exported("f").result() == []


# --- many at once --------------------------------------------------------------------------------


def test_calls_of_the_host_wait_here_for_their_turn(attached: Host) -> None:
    """The controller takes 64 at once, with 1 MiB."""
    services = attached.controller.services
    services.hold_answers = True
    values = [b"%d" % i for i in range(300)]
    for i, value in enumerate(values):
        store_set(f"k{i}", value)
    others = gather(*(store_get(f"k{i}") for i in range(300)))
    attached.settle()  # other calls are not held up
    assert len(attached.controller.of(abi.StoreSet)) == 64
    attached.controller.next_frame.append(services.answer_held)
    attached.settle()
    assert others.result() == values
    assert services.most_held == 64


def test_large_calls_wait_by_their_octets(attached: Host) -> None:
    services = attached.controller.services
    services.hold_answers = True
    for i in range(40):
        store_set(f"k{i}", b"x" * 60000)
    attached.settle()
    assert len(attached.controller.of(abi.StoreSet)) == (1 << 20) // 60000
    attached.controller.next_frame.append(services.answer_held)
    attached.settle()
    assert store_exists("k39").result()


def test_a_child_s_calls_stay_behind_its_start(attached: Host) -> None:
    services = attached.controller.services
    services.programs[""] = lambda child, data: services.say(child, data or b"")
    services.hold_answers = True
    for i in range(100):
        store_set(f"k{i}", "")
    with spawn() as child:
        child.send("hi")
        attached.settle()
        assert not services.children
        attached.controller.next_frame.append(services.answer_held)
        attached.settle()
        assert child.receive().result() == b"hi"


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: broadcast("", "x"),
        lambda: broadcast("t" * 257, "x"),
        lambda: broadcast("\u4e16" * 86, "x"),  # 258 octets
        lambda: broadcast(b"t", "x"),  # type: ignore[arg-type]
        lambda: broadcast("t", "x" * 60001),
        lambda: broadcast("t", 5),  # type: ignore[arg-type]
        lambda: broadcast("\ud800", "x"),
        lambda: subscribe(None),  # type: ignore[arg-type]
        lambda: store_get(""),
        lambda: store_get(3),  # type: ignore[arg-type]
        lambda: store_set("k", b"x" * 60001),
        lambda: store_set("k", None),  # type: ignore[arg-type]
        lambda: store_list("p" * 257),
        lambda: list_exported(1),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_refused_here(attached: Host, call: Callable[[], object]) -> None:
    with pytest.raises(ArgumentError) as caught:
        call()
    assert caught.value.message and caught.value.hint
    attached.settle()
    assert len(attached.controller.commands) == 1  # nothing of it was sent
