"""spawn: messages to and from a child, its exit, and its end."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import pytest
from inferlet import (
    ArgumentError,
    Child,
    ClosedError,
    Future,
    NotFoundError,
    QuotaError,
    abi,
    gather,
    spawn,
)
from scripted import Host


@pytest.fixture
def programs(attached: Host) -> dict[str, Callable[[int, bytes | None], None]]:
    """`""` echoes until its input is closed, `worker` says its arguments."""
    services = attached.controller.services

    def echo(child: int, message: bytes | None) -> None:
        if message is None:
            services.exit(child, 3)
        else:
            services.say(child, message)

    services.programs[""] = services.programs["worker"] = echo
    return services.programs


@pytest.mark.usefixtures("programs")
class TestChildren:
    def test_messages_both_ways(self) -> None:
        with spawn() as child:
            assert child.id.result().startswith("child-")
            child.send("h\u00e9")
            child.send(b"\xff").result()
            assert child.receive().result() == "h\u00e9".encode()
            assert child.receive().result() == b"\xff"
            child.close()
            assert child.wait().result() == 3
            with pytest.raises(ClosedError):
                child.receive().result()

    def test_messages_are_iterated_until_it_ends(self) -> None:
        with spawn("worker", ["a", "b"]) as child:
            child.send("c")
            child.close()
            assert list(child) == [b"a", b"b", b"c"]

    def test_under_asyncio(self) -> None:
        async def ask(text: str) -> tuple[list[bytes], int]:
            with spawn(args=[text]) as child:
                await child.send("more")
                child.close()
                return [message async for message in child], await child.wait()

        async def both() -> list[tuple[list[bytes], int]]:
            return list(await asyncio.gather(ask("a"), ask("b")))

        assert asyncio.run(both()) == [([b"a", b"more"], 3), ([b"b", b"more"], 3)]

    def test_many_take_one_round_trip(self, attached: Host) -> None:
        children = [spawn(args=[str(i)]) for i in range(20)]
        answers = gather(*(child.receive() for child in children)).result()
        assert answers == [b"%d" % i for i in range(20)]
        assert len(attached.controller.frames) == 1

    def test_the_with_block_ends_it(self, attached: Host) -> None:
        with spawn() as child:
            waits = child.receive()
        attached.settle()
        assert not attached.controller.services.children
        with pytest.raises(ClosedError):
            waits.result()
        for use in (lambda: child.send("x"), child.receive, child.close, child.wait):
            with pytest.raises(ClosedError, match="was ended"):
                use()
        child.end()
        assert list(child) == []

    def test_it_runs_on_when_nothing_refers_to_it(self, attached: Host) -> None:
        spawn()
        gc.collect()
        attached.settle()
        assert len(attached.controller.services.children) == 1

    def test_a_child_that_has_ended_gives_its_handle_back(self, attached: Host) -> None:
        waited, child = spawn(), spawn()
        waited.close()
        child.close()
        assert waited.wait().result() == 3 and waited.wait().result() == 3
        assert len(attached.controller.of(abi.WaitChild)) == 1
        del waited, child
        gc.collect()
        attached.settle()  # learns that they have ended
        attached.settle()
        assert not attached.controller.services.children

    def test_what_cannot_start_says_why_whatever_is_asked(self, attached: Host) -> None:
        uses: list[Callable[[Child], Future[Any]]] = [
            lambda child: child.id,
            lambda child: child.send("x"),
            Child.receive,
            Child.wait,
        ]
        for use in uses:
            with pytest.raises(NotFoundError, match="nobody"):
                use(spawn("nobody")).result()
        with pytest.raises(NotFoundError):
            next(spawn("nobody"))

    @pytest.mark.parametrize("first", [Child.receive, Child.wait, next])
    def test_a_lost_message_fails_the_wait_for_what_it_would_bring(
        self, attached: Host, first: Callable[[Child], Any]
    ) -> None:
        attached.controller.services.child_room = 5
        with spawn() as child:
            child.send("small")
            child.send("too large")
            with pytest.raises(QuotaError, match="too much waits"):
                outcome = first(child)
                outcome.result()
            # once: the child goes on, and nothing it said is lost
            assert child.receive().result() == b"small"
            child.send("more")
            assert next(child) == b"more"
            child.close()
            assert child.wait().result() == 3

    def test_a_lost_message_fails_a_wait_under_asyncio(self, attached: Host) -> None:
        attached.controller.services.child_room = 5

        async def main() -> None:
            with spawn() as child:
                child.send("too large")
                with pytest.raises(QuotaError):
                    await child.receive()
                child.send("small")
                assert await child.receive() == b"small"

        asyncio.run(main())

    def test_a_lost_message_that_somebody_asked_about_fails_nothing_else(
        self, attached: Host
    ) -> None:
        attached.controller.services.child_room = 5
        with spawn() as child:
            answer = child.receive()
            for wrap in (lambda sent: sent, gather):
                with pytest.raises(QuotaError):
                    wrap(child.send("too large")).result()
            child.send("small").result()
            assert answer.result() == b"small"

    def test_what_a_child_has_said_comes_though_it_reads_no_more(self, attached: Host) -> None:
        with spawn() as child:
            child.send("last")
            child.close()
            child.send("behind the end")
            assert list(child) == [b"last"] and child.wait().result() == 3

    @pytest.mark.parametrize(
        "call",
        [
            lambda: spawn("p" * 257),
            lambda: spawn(5),  # type: ignore[arg-type]
            lambda: spawn(args="abc"),
            lambda: spawn(args=[1]),  # type: ignore[list-item]
            lambda: spawn(args=["x"] * 257),
            lambda: spawn().send("x" * 60001),
            lambda: spawn().send(None),  # type: ignore[arg-type]
        ],
    )
    def test_wrong_arguments(self, call: Callable[[], object]) -> None:
        with pytest.raises(ArgumentError):
            call()
