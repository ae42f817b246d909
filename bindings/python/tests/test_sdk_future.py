"""Futures of one and of several answers, in both colours, and when commands leave by themselves."""

from __future__ import annotations

import asyncio
import queue
import threading
from typing import Any

import pytest
from inferlet import (
    ArgumentError,
    CancelledError,
    ClosedError,
    Future,
    InferletError,
    SpanError,
    abi,
    gather,
    http_get,
    list_exported,
    spawn,
)
from inferlet.future import Composite, Steps, after
from scripted import Host
from test_sdk_connection import Peer


@pytest.fixture
def peer(request: pytest.FixtureRequest) -> Peer:
    peer = Peer()
    request.addfinalizer(peer.ours.close)
    request.addfinalizer(peer.theirs.close)
    return peer


def test_gather_gives_all_values_in_order(peer: Peer) -> None:
    futures = [peer.ask() for _ in range(3)]
    together = gather(*futures)
    assert not together.done()
    assert len(peer.frame()) == 3
    peer.answer([0, 2, "c"], [0, 0, "a"])
    assert not together.done()
    peer.answer([0, 1, "b"])
    assert together.done() and together.result() == ["a", "b", "c"] == together.result()
    assert gather().result() == []
    assert gather(gather(*futures), gather(*futures)).result() == [["a", "b", "c"]] * 2


def test_one_that_was_not_waited_for_says_so(peer: Peer) -> None:
    future = peer.ask()
    for each in (future, gather(future)):
        with pytest.raises(TypeError, match=r"wait for it with .result\(\) or await"):
            bool(each)
        with pytest.raises(AttributeError, match=r"no 'decode': wait .* .result\(\) or await"):
            each.decode()  # type: ignore[attr-defined]
        assert ".result() or await" in str(each)
    peer.connection.flush()
    peer.answer([0, 0, b"value"])
    assert future.result() == b"value" and str(future) == "<Future: b'value'>"


def test_python_s_own_errors_name_what_programs_know(attached: Host) -> None:
    with attached.model.queue() as queue:
        out = queue.forward(queue.embed_txt([1]))
        futures: list[Any] = [
            attached.model.tokenize("x"),
            gather(attached.model.tokenize("x")),
            queue.synchronize(),
            spawn().id,
            spawn().receive(),
            http_get("https://nowhere").head,
            http_get("https://nowhere").text(),
        ]
        for future in futures:
            with pytest.raises(TypeError, match=r"^'Future' object is not"):
                iter(future)
            with pytest.raises(ArgumentError, match="of type Future"):
                queue.embed_txt(future)
        for value, name in ((queue.sample(out), "Token"), (list_exported(), "Listing")):
            assert type(value).__name__ == name
        methods: list[Any] = [queue.forward, queue.sample, queue.alloc_kvpage, queue.synchronize]
        for method in [*methods, queue.embed_txt, queue.export_kvpage, queue.cancel]:
            with pytest.raises(TypeError, match=r"^Queue\.\w+\(\) "):
                method(1, 2, 3, 4, 5)


def test_a_second_thread_is_refused_instead_of_waiting_for_ever(peer: Peer) -> None:
    futures = [peer.ask(), peer.ask()]
    refusals: queue.Queue[InferletError] = queue.Queue()

    def wait(future: Future[object]) -> None:
        try:
            future.result()
        except InferletError as error:
            refusals.put(error)

    threads = [threading.Thread(target=wait, args=[future], daemon=True) for future in futures]
    for thread in threads:
        thread.start()
    assert "another thread waits" in refusals.get(timeout=20).message
    peer.answer([0, 0, "a"], [0, 1, "b"])
    for thread in threads:
        thread.join(20)
    assert [future.result() for future in futures] == ["a", "b"] and refusals.empty()


def test_gather_fails_with_the_first_error(peer: Peer) -> None:
    futures = [peer.ask() for _ in range(3)]
    together = gather(*futures)
    peer.connection.flush()
    peer.answer([0, 0, "a"], [1, 1, 3, "why", "try"], [0, 2, "c"])
    for _ in range(2):
        with pytest.raises(SpanError, match="why"):
            together.result()
    assert futures[2].result() == "c"


def test_thousands_are_gathered_in_few_frames(host: Host) -> None:
    futures = [host.model.tokenize(str(i), special=False) for i in range(3000)]
    values = gather(*futures).result()
    assert values == [list(str(i).encode()) for i in range(3000)]
    assert len(host.controller.frames) == 1


def two_steps(peer: Peer) -> Future[str]:
    def steps() -> Steps[str]:
        first: str = yield peer.ask()
        try:
            second: str = yield peer.ask()
        except SpanError as error:
            second = error.message
        return first + second

    return Composite(steps())


def test_steps_go_on_while_somebody_waits(peer: Peer) -> None:
    both = two_steps(peer)
    assert not both.done()
    assert len(peer.frame()) == 1 and peer.quiet()  # the second waits for the first
    peer.answer([0, 0, "a"])
    assert not both.done()
    assert len(peer.frame()) == 1
    peer.answer([1, 1, 3, "b", ""])
    assert both.result() == "ab" == both.result()


def test_steps_are_awaited_by_several_tasks(peer: Peer) -> None:
    async def program() -> list[str]:
        both = two_steps(peer)

        async def wait() -> str:
            return await both

        tasks = [asyncio.ensure_future(wait()) for _ in range(3)]
        await asyncio.sleep(0)
        tasks.pop().cancel()
        peer.answer([0, 0, "a"])
        await asyncio.sleep(0.01)
        peer.answer([0, 1, "b"])
        return await asyncio.gather(*tasks)

    assert asyncio.run(program()) == ["ab", "ab"]


def test_the_end_of_piehost_fails_all_steps(peer: Peer) -> None:
    both, together = two_steps(peer), gather(peer.ask(), peer.ask())
    peer.connection.flush()
    peer.answer([0, 0, "a"], [0, 1, "x"])
    peer.theirs.close()
    for future in (both, together):
        for _ in range(2):
            with pytest.raises(ClosedError):
                future.result()


def test_after_tells_the_cause(peer: Peer) -> None:
    made, used = peer.ask(), peer.ask()
    both = after(made, used)
    peer.connection.flush()
    peer.answer([1, 0, 7, "the cause", ""], [1, 1, 2, "what follows", ""])
    with pytest.raises(Exception, match="the cause"):
        both.result()
    first, second = peer.ask(), peer.ask()
    peer.connection.flush()
    peer.answer([0, 2, None])
    assert first.result() is None
    assert after(first, second) is second
    peer.answer([1, 3, 10, "dropped", ""])
    with pytest.raises(CancelledError):
        second.result()


# --- when commands leave under an event loop -----------------------------------------------------


def test_commands_leave_when_the_loop_is_idle(host: Host) -> None:
    async def program() -> None:
        host.runtime.send("a")
        host.runtime.send("b")
        assert host.controller.sent == []
        while len(host.controller.sent) < 2:
            await asyncio.sleep(0.001)  # not a wait for an answer
        host.runtime.send("c")
        while len(host.controller.sent) < 3:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(program(), 20))
    assert [len(frame) for frame in host.controller.frames] == [2, 1]


def test_what_tasks_queue_side_by_side_leaves_together(host: Host) -> None:
    async def one(text: str) -> list[int]:
        host.runtime.send(text)
        await asyncio.sleep(0)
        return await host.model.tokenize(text)

    async def program() -> None:
        await asyncio.gather(*(one(text) for text in "abc"))

    asyncio.run(program())
    assert [[type(c) for c in frame] for frame in host.controller.frames] == [
        [abi.Send] * 3,
        [abi.Tokenize] * 3,
    ]


def test_a_loop_that_ends_early_leaves_nothing_unsent(host: Host) -> None:
    async def program(text: str) -> None:
        host.runtime.send(text)

    for text in "ab":
        asyncio.run(program(text))  # the loop ends before it is idle
    host.settle()
    assert host.controller.sent == [b"a", b"b"]

    async def waits() -> list[int]:
        return await host.model.tokenize("c", special=False)

    assert asyncio.run(waits()) == [99]


def test_without_a_loop_nothing_leaves_before_flush(host: Host) -> None:
    host.runtime.send("a")
    assert host.controller.frames == []
    host.runtime.connection.flush()
    host.settle()
    assert host.controller.sent == [b"a"]
