"""The connection: when frames leave, how answers find their futures, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest
from inferlet import ArgumentError, CancelledError, ClosedError, SpanError, abi
from inferlet.connection import Connection
from inferlet.future import Answer, Future
from scripted import Host
from scripted_controller import framed, take_frame


class Peer:
    """A controller whose every frame the test writes by hand."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.theirs.settimeout(20)
        self.connection = Connection(self.ours.fileno())
        self._buffer = bytearray()

    def ask(self) -> Future[object]:
        connection = self.connection
        return connection.ask(abi.Synchronize(None, 1), Answer(connection, lambda value: value))

    def frame(self) -> list[abi.AnyCommand]:
        """The next frame that the program sent."""
        while (body := take_frame(self._buffer)) is None:
            self._buffer += self.theirs.recv(1 << 16)
        return msgspec.msgpack.decode(body, type=abi.Frame)

    def quiet(self) -> bool:
        """True if the program has sent nothing more."""
        self.theirs.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            self._buffer += self.theirs.recv(1 << 16)
        self.theirs.settimeout(20)
        return not self._buffer

    def answer(self, *answers: list[object]) -> None:
        self.theirs.sendall(framed(abi.encoder.encode(list(answers))))


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.ours.close()
    peer.theirs.close()


def test_nothing_leaves_before_a_wait(peer: Peer) -> None:
    for _ in range(10):
        peer.connection.append(abi.Send(None, b"x"))
    assert peer.quiet()
    future = peer.ask()
    assert peer.quiet()
    assert not future.done()
    assert len(peer.frame()) == 11 and peer.quiet()


def test_answers_in_any_order(peer: Peer) -> None:
    futures = [peer.ask() for _ in range(4)]
    peer.connection.flush()
    peer.answer([0, 2, "c"], [1, 0, 3, "why", "try"])
    assert futures[2].result() == "c"
    assert not futures[1].done() and futures[0].done()
    with pytest.raises(SpanError, match="why") as caught:
        futures[0].result()
    assert caught.value.hint == "try"
    peer.answer([0, 3, "d"], [0, 1, "b"])
    assert [f.result() for f in futures[1:]] == ["b", "c", "d"]


def test_request_ids_in_use_are_passed_over(peer: Peer) -> None:
    first = peer.ask()
    peer.connection._next_request = 0xFFFFFFFF
    last, wrapped = peer.ask(), peer.ask()
    peer.connection.flush()
    assert [c.req for c in peer.frame()] == [0, 0xFFFFFFFF, 1]
    peer.answer([0, 1, "wrapped"], [0, 0, "first"], [0, 0xFFFFFFFF, "last"])
    assert (wrapped.result(), first.result(), last.result()) == ("wrapped", "first", "last")


def test_a_frame_holds_4096_commands(peer: Peer) -> None:
    for _ in range(5000):
        peer.connection.append(abi.Cancel(None, 1))
    assert len(peer.frame()) == abi.MAX_COMMANDS_PER_FRAME and peer.quiet()
    peer.connection.flush()
    assert len(peer.frame()) == 5000 - abi.MAX_COMMANDS_PER_FRAME


def test_a_frame_holds_65536_octets(peer: Peer) -> None:
    messages = [bytes([i]) * 30000 for i in range(5)]
    received: list[bytes] = []

    def read() -> None:
        while len(received) < 5:
            received.extend(c.data for c in peer.frame() if isinstance(c, abi.Send))

    reader = threading.Thread(target=read)
    reader.start()
    for message in messages:
        peer.connection.append(abi.Send(None, message))
    peer.connection.flush()
    reader.join(20)
    assert received == messages
    with pytest.raises(ArgumentError, match="a frame holds"):
        peer.connection.append(abi.EmbedTxt(None, 1, (1, 0), [70000] * 20000))


def test_what_is_refused_takes_no_request_id(peer: Peer) -> None:
    too_large = abi.Tokenize(None, 0, "x" * 70000)
    with pytest.raises(ArgumentError, match="a frame holds"):
        peer.connection.ask(too_large, Answer(peer.connection, lambda value: value))
    peer.connection._next_request = 0
    future = peer.ask()
    peer.connection.flush()
    assert [c.req for c in peer.frame()] == [0]
    peer.answer([0, 0, "its own"])
    assert future.result() == "its own"


def test_answers_are_read_while_a_program_only_sends(peer: Peer) -> None:
    """So that they do not pile up at the controller, which would end the inferlet."""
    future = peer.ask()
    peer.connection.flush()
    peer.frame()
    peer.answer([0, 0, 5])
    for _ in range(abi.MAX_COMMANDS_PER_FRAME + 1):
        peer.connection.append(abi.Cancel(None, 1))
    assert future.answered


def test_the_end_of_the_controller_fails_what_waits(peer: Peer) -> None:
    first, second = peer.ask(), peer.ask()
    peer.connection.flush()
    peer.answer([0, 0, "in time"])
    peer.theirs.close()
    assert first.result() == "in time"
    with pytest.raises(ClosedError, match="connection to piehost ended"):
        second.result()
    with pytest.raises(ClosedError):
        peer.ask()


def test_the_end_while_sending(peer: Peer) -> None:
    future = peer.ask()
    peer.theirs.close()
    with pytest.raises(ClosedError):
        future.result()


def test_await_under_plain_asyncio(host: Host) -> None:
    async def both() -> tuple[list[int], list[int]]:
        one, other = await asyncio.gather(
            one_text("ab"),
            one_text("cd"),
        )
        return one, other

    async def one_text(text: str) -> list[int]:
        tokens = await host.model.tokenize(text, special=False)
        if text == "e":  # nobody waits, so the loop does not watch the socket any more
            assert not asyncio.get_running_loop().remove_reader(host.runtime.connection.fd)
        return tokens

    assert asyncio.run(both()) == ([97, 98], [99, 100])
    assert len(host.controller.frames) == 1  # tasks side by side share a frame
    assert asyncio.run(one_text("e")) == [101]  # another loop
    assert host.model.tokenize("f", special=False).result() == [102]


def test_await_raises_and_times_out(peer: Peer) -> None:
    async def program() -> None:
        never, fails, late = peer.ask(), peer.ask(), peer.ask()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wait(never), 0.01)
        peer.answer([1, 1, 10, "cancelled", ""], [0, 0, "after all"])
        with pytest.raises(CancelledError):
            await fails
        assert await never == "after all"
        peer.theirs.close()
        with pytest.raises(ClosedError):
            await late

    async def wait(future: Future[object]) -> object:
        return await future

    asyncio.run(program())


def test_generation_under_asyncio_side_by_side(host: Host) -> None:
    async def one(prompt: str) -> str:
        with host.model.context(prompt) as context:
            return "".join([piece async for piece in context.generate(50)])

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*[one(prompt) for prompt in ("a", "b", "c")])

    together = asyncio.run(all_of_them())
    assert together == [asyncio.run(one(prompt)) for prompt in ("a", "b", "c")]
    assert len(set(together)) == 3
