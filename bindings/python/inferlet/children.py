"""Children: inferlets that this one starts, and the messages between them."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from typing import TypeVar

from .abi import (
    MAX_FRAME_BYTES,
    MAX_SPAWN_ARGS,
    MAX_TOPIC_BYTES,
    CloseChild,
    Command,
    EndChild,
    ReceiveChild,
    SendChild,
    Spawn,
    WaitChild,
)
from .checks import message, text, texts
from .connection import Connection
from .errors import ClosedError, InferletError
from .future import Answer, Composite, Future, Steps, nothing, same
from .runtime import Runtime, runtime
from .scope import Scoped
from .series import Series

T = TypeVar("T")


def spawn(program: str = "", args: Sequence[str] = ()) -> Child:
    """Starts a child: this inferlet's own program, or one that its inferlet.toml names under
    `[children]`, with these arguments. Its `send` and `receive` speak to this inferlet.

    ArgumentError for arguments that are not at most 256 texts. What is waited for on the child
    fails with NotFoundError, QuotaError or UnavailableError if it could not be started.
    """
    text("the program", program, MAX_TOPIC_BYTES)
    return Child(runtime, program, texts("args", args, MAX_SPAWN_ARGS, MAX_FRAME_BYTES))


class Child(Scoped, Series[bytes]):
    """A child: its messages, for `for` and `async for`, or one by one with `receive`.

    What a `send` fails with that nobody has asked for fails the next wait for the child instead,
    which might never end: what it waits for may be the child's answer to that message.

    As a context manager it is ended if it still runs. Otherwise it runs on, referred to or not,
    until this inferlet ends.
    """

    def __init__(self, runtime: Runtime, program: str, args: list[str]) -> None:
        super().__init__(runtime.connection)
        self._number = runtime.new_handle()
        self.id: Future[str] = self.connection.ask(
            Spawn(None, self._number, program, args), Answer(self.connection, same)
        )
        self._exit: Answer[int] | None = None
        self._sends: deque[_Sent] = deque()  # those that may have failed without anybody knowing

    def __del__(self) -> None:
        if number := getattr(self, "_number", 0):  # not there if the constructor raised
            # the handle is given back only once the child has ended by itself
            self.connection.release(WaitChild(None, number), _Ended(self.connection, number))

    def send(self, data: str | bytes) -> Future[None]:
        """Sends a message; messages keep their bounds and order. Nobody has to wait for the
        answer: QuotaError if too much waits for the child, ClosedError if it reads no more.
        ArgumentError if it is longer than 60,000 octets."""
        command = SendChild(None, self.number, message(data))
        answer = self.connection.ask(command, Answer(self.connection, nothing))
        while self._sends and self._sends[0].settled:
            self._sends.popleft()
        self._sends.append(_Sent(self.id, answer))
        return self._sends[-1]

    def receive(self) -> Future[bytes]:
        """The child's next message. ClosedError if there will be none; what a `send` before the
        wait failed with, if nobody has asked: the message then comes with the next `receive`."""
        return self._next()

    def close(self) -> None:
        """No more messages to the child: its `receive` fails with ClosedError after the last."""
        self.connection.append(CloseChild(None, self.number))

    def wait(self) -> Future[int]:
        """Its exit code, once it has ended; 128 + n: by signal n. Fails as `receive` with what a
        `send` failed with; another `wait` then gives the code."""
        if self._exit is None:
            command = WaitChild(None, self.number)
            self._exit = self.connection.ask(command, Answer(self.connection, same))
        return Composite(self._behind_sends(self._exit))

    def end(self) -> None:
        """Ends the child if it runs; nothing if this was called before."""
        number, self._number = self._number, 0
        if number:
            with contextlib.suppress(ClosedError):
                self.connection.append(EndChild(None, number))

    def _leave(self) -> None:
        self.end()

    @property
    def number(self) -> int:
        """The child on the wire. ClosedError after `end`."""
        if not self._number:
            raise ClosedError("the child was ended", "use it inside its `with` block")
        return self._number

    def _ask(self) -> Future[bytes]:
        command: Command = ReceiveChild(None, self.number)
        answer = self.connection.ask(command, Answer(self.connection, same))
        return Composite(self._received(answer))

    def _received(self, answer: Answer[bytes]) -> Steps[bytes]:
        try:
            message: bytes = yield from self._behind_sends(answer)
        except InferletError:
            if answer.error is None:  # the next one gets the message, come or still to come
                self._given_up.append(Composite(self._received(answer)))
            raise
        return message

    def _behind_sends(self, answer: Answer[T]) -> Steps[T]:
        """`answer`, unless a message did not get there and nobody has asked what became of it."""
        yield self.id  # whose error tells more than what then becomes of the others
        for sent in list(self._sends):
            try:
                yield sent.answer
            except InferletError:
                if not sent.settled:
                    sent.asked = True
                    raise
        value: T = yield answer
        return value


class _Sent(Composite[None]):
    """A message on its way."""

    __slots__ = ("answer", "asked")

    def __init__(self, started: Future[str], answer: Answer[None]) -> None:
        """`started` tells more, if it failed, than what then becomes of `answer`."""
        self.answer = answer
        self.asked = False  # somebody knows what became of it, or waits for that

        def steps() -> Steps[None]:
            yield started
            yield answer

        super().__init__(steps())

    @property
    def settled(self) -> bool:
        """Nobody has to be told any more what became of it. That the child reads no more is no
        reason not to wait for what it has said, or for its exit code."""
        error = self.answer.error
        told = self.asked or error is None or isinstance(error, ClosedError)
        return self.answer.answered and told

    def result(self) -> None:
        self.asked = True
        super().result()

    @property
    def error(self) -> Exception | None:
        self.asked = True
        return super().error


class _Ended(Answer[None]):
    """The end of a child that nothing refers to any more."""

    __slots__ = ("_number",)

    def __init__(self, connection: Connection, number: int) -> None:
        super().__init__(connection, nothing)
        self._number = number

    def resolve(self, value: object) -> None:
        self._connection.release(EndChild(None, self._number))
        super().resolve(value)
