"""Children: inferlets that this one starts, and the messages between them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType

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
from .errors import ClosedError
from .future import Answer, Future, after, nothing, same
from .runtime import Runtime, runtime
from .series import Series


def spawn(program: str = "", args: Sequence[str] = ()) -> Child:
    """Starts a child: this inferlet's own program, or one that its inferlet.toml names under
    `[children]`, with these arguments. Its `send` and `receive` speak to this inferlet.

    ArgumentError for arguments that are not at most 256 texts. What is waited for on the child
    fails with NotFoundError, QuotaError or UnavailableError if it could not be started.
    """
    text("the program", program, MAX_TOPIC_BYTES)
    return Child(runtime, program, texts("args", args, MAX_SPAWN_ARGS, MAX_FRAME_BYTES))


class Child(Series[bytes]):
    """A child: its messages, for `for` and `async for`, or one by one with `receive`.

    As a context manager it is ended if it still runs. Otherwise it runs on, referred to or not,
    until this inferlet ends.
    """

    def __init__(self, runtime: Runtime, program: str, args: list[str]) -> None:
        super().__init__(runtime.connection)
        self._number = runtime.new_handle()
        self.id: Future[str] = self.connection.ask(
            Spawn(None, self._number, program, args), Answer(self.connection, same)
        )
        self._exit: Future[int] | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def __del__(self) -> None:
        if number := getattr(self, "_number", 0):  # not there if the constructor raised
            # the handle is given back only once the child has ended by itself
            self.connection.release(WaitChild(None, number), _Ended(self.connection, number))

    def send(self, data: str | bytes) -> Future[None]:
        """Sends a message; messages keep their bounds and order. Nobody has to wait for the
        answer. ArgumentError if it is longer than 60,000 octets."""
        command = SendChild(None, self.number, message(data))
        return after(self.id, self.connection.ask(command, Answer(self.connection, nothing)))

    def receive(self) -> Future[bytes]:
        """The child's next message. ClosedError if there will be none."""
        return self._next()

    def close(self) -> None:
        """No more messages to the child: its `receive` fails with ClosedError after the last."""
        self.connection.append(CloseChild(None, self.number))

    def wait(self) -> Future[int]:
        """Its exit code, once it has ended; 128 + n: by signal n."""
        if self._exit is None:
            command = WaitChild(None, self.number)
            answer = Answer(self.connection, same)
            self._exit = after(self.id, self.connection.ask(command, answer))
        return self._exit

    def end(self) -> None:
        """Ends the child if it runs; nothing if this was called before."""
        number, self._number = self._number, 0
        if number:
            with contextlib.suppress(ClosedError):
                self.connection.append(EndChild(None, number))

    @property
    def number(self) -> int:
        """The child on the wire. ClosedError after `end`."""
        if not self._number:
            raise ClosedError("the child was ended", "use it inside its `with` block")
        return self._number

    def _ask(self) -> Future[bytes]:
        command: Command = ReceiveChild(None, self.number)
        return after(self.id, self.connection.ask(command, Answer(self.connection, same)))


class _Ended(Answer[None]):
    """The end of a child that nothing refers to any more."""

    __slots__ = ("_number",)

    def __init__(self, connection: Connection, number: int) -> None:
        super().__init__(connection, nothing)
        self._number = number

    def resolve(self, value: object) -> None:
        self._connection.release(EndChild(None, self._number))
        super().resolve(value)
