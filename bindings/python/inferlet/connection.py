"""The connection to the controller: an outbox of commands, and answers matched to futures.

Commands are encoded when they are queued and leave as one frame when the program first waits,
when the frame is full, at the program's end (`docs/abi.md` section 2), or, if an event loop runs,
when its tasks that can run have run. A program without one that computes for long between waits
calls `flush`: nothing here runs beside it. One thread.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from .abi import (
    ANSWER_OK,
    FLAG_LONG,
    MAX_COMMANDS_PER_FRAME,
    MAX_FRAME_BYTES,
    Command,
    encoder,
    frame_header,
)
from .errors import ArgumentError, ClosedError, FrameError, InferletError, from_answer
from .future import Answer
from .host_calls import HOST_CALLS, HostCalls

if TYPE_CHECKING:
    import asyncio

A = TypeVar("A", bound=Answer[Any])

_READ_BYTES = 1 << 16
_ARRAY_HEADER_BYTES = 3
_decode_answers = msgspec.msgpack.Decoder(list[list[Any]]).decode


class Connection:
    """One end of the socket at `fd`, which stays in blocking mode.

    Every method may raise ClosedError once the controller has gone.
    """

    def __init__(self, fd: int, frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self.fd = fd
        self._room = min(frame_bytes, MAX_FRAME_BYTES) - _ARRAY_HEADER_BYTES
        self._out = bytearray()  # encoded commands, one after the other
        self._count = 0
        # from finalizers, which may run at any moment
        self._released: list[tuple[Command, Answer[Any] | None]] = []
        self._in = bytearray()
        self._reading = False
        self._pending: dict[int, Answer[Any]] = {}
        self._host_calls = HostCalls()
        self._next_request = 0
        self.closed: ClosedError | None = None  # once the controller has gone
        self._watchers = 0  # tasks of an event loop that wait here
        self._flushes: asyncio.AbstractEventLoop | None = None  # the loop that is about to

    # --- out -------------------------------------------------------------------------------

    def append(self, command: Command) -> None:
        """Queues `command`. ArgumentError if it is too large for a frame."""
        if self._released:
            self._append_released()
        self._encode(command)

    def ask(self, command: Command, future: A) -> A:
        """Queues `command` with a fresh request id; its answer resolves `future`."""
        if self._released:
            self._append_released()
        request = self._number(command, future)
        try:
            self._encode(command)
        except ArgumentError:
            del self._pending[request]
            raise
        return future

    def _number(self, command: Command, future: Answer[Any]) -> int:
        """Gives `command` a request id that is not in use."""
        request = self._next_request
        while request in self._pending:
            request = (request + 1) & 0xFFFFFFFF
        command.req = request
        self._pending[request] = future
        self._next_request = (request + 1) & 0xFFFFFFFF
        return request

    def release(self, command: Command, future: Answer[Any] | None = None) -> None:
        """Queues `command` behind everything queued so far. Safe to call from a finalizer."""
        self._released.append((command, future))

    def _append_released(self) -> None:
        while self._released:
            command, future = self._released.pop(0)
            if future is not None:
                self._number(command, future)
            self._encode(command)

    def _encode(self, command: Command) -> None:
        if self.closed is not None:
            raise self.closed
        try:
            octets = encoder.encode(command)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ArgumentError(
                f"the {type(command).__name__} command holds what cannot be sent: {error}",
                "give str, bytes, bool, numbers, None, and lists and dicts of them",
            ) from None
        if len(octets) > self._room:
            raise ArgumentError(
                f"the {type(command).__name__} command takes {len(octets)} octets, "
                f"a frame holds {self._room}",
                "split it into several calls",
            )
        if type(command) in HOST_CALLS and self._host_calls.hold(command, octets):
            return
        if self._put(octets):
            self._drain()  # unread answers must not pile up while a program only sends

    def _put(self, octets: bytes) -> bool:
        """Adds an encoded command to the frame; true if another had to leave for it."""
        full = len(self._out) + len(octets) > self._room or self._count == MAX_COMMANDS_PER_FRAME
        if full:
            self._write_frame()
        if not self._count:
            self._flush_on_idle()
        self._out += octets
        self._count += 1
        return full

    def flush(self) -> None:
        """Sends what is queued, if anything."""
        if self.closed is not None:
            raise self.closed
        self._append_released()
        self._write_frame()

    def finish(self) -> None:
        """Sends what is queued, also what has to wait for answers to leave."""
        self.flush()
        while self._host_calls.held:
            self._read()

    def _write_frame(self) -> None:
        if not self._count:
            return
        if self._count < 16:
            array = bytes((0x90 | self._count,))
        else:
            array = b"\xdc" + self._count.to_bytes(2, "big")
        frame = frame_header(len(array) + len(self._out)) + array + self._out
        self._out.clear()
        self._count = 0
        rest = memoryview(frame)
        try:
            while rest:
                rest = rest[os.write(self.fd, rest) :]
        except OSError as error:
            raise self._end(str(error)) from error

    # --- in --------------------------------------------------------------------------------

    def wait(self, future: Answer[Any]) -> None:
        """Sends what is queued and reads until `future` is answered."""
        self.flush()
        while not future.answered:
            self._read()

    def poll(self) -> None:
        """Sends what is queued and reads what has arrived, without waiting."""
        self.flush()
        self._drain()

    def _drain(self) -> None:
        poller = select.poll()
        poller.register(self.fd, select.POLLIN)
        while self.closed is None and poller.poll(0):
            with contextlib.suppress(ClosedError):  # the futures know
                self._read()

    def _read(self) -> None:
        """One read: resolves the futures of every whole frame that has arrived."""
        if self.closed is not None:
            raise self.closed
        if self._reading:  # the answer of one thread would go to another, which waits for ever
            raise InferletError(
                "another thread waits for an answer",
                "use one thread; tasks of asyncio, `gather` or `interleave` run side by side",
            )
        self._reading = True
        try:
            self._read_once()
        finally:
            self._reading = False

    def _read_once(self) -> None:
        try:
            octets = os.read(self.fd, _READ_BYTES)
        except OSError as error:
            raise self._end(str(error)) from error
        if not octets:
            raise self._end("end of file")
        self._in += octets
        at = 0
        while (frame := self._whole_frame(at)) is not None:
            first, at = frame
            for answer in _decode_answers(bytes(self._in[first:at])):
                self._resolve(answer)
        del self._in[:at]
        if self._host_calls.held:
            for octets in self._host_calls.ready():
                self._put(octets)
            self._write_frame()

    def _whole_frame(self, at: int) -> tuple[int, int] | None:
        """(begin, end) of the body of the frame at `at`, or None if it has not all arrived."""
        have = len(self._in) - at
        if have < 2:
            return None
        flags, size, header = self._in[at], self._in[at + 1], 2
        if flags == FLAG_LONG:
            if have < 9:
                return None
            size, header = int.from_bytes(self._in[at + 1 : at + 9], "big"), 9
        if flags not in (0, FLAG_LONG) or size > MAX_FRAME_BYTES:
            raise FrameError(
                f"the controller sent a frame with flags {flags} and {size} octets",
                "run an inferlet SDK of the same version as piehost",
            )
        return (at + header, at + header + size) if have >= header + size else None

    def _resolve(self, answer: list[Any]) -> None:
        future = self._pending.pop(answer[1])
        if self._host_calls.asked:
            self._host_calls.answered(answer[1])
        if answer[0] == ANSWER_OK:
            future.resolve(answer[2])
        else:
            future.fail(from_answer(*answer[2:5]))

    def _end(self, reason: str) -> ClosedError:
        """The controller is gone: every pending future fails with the error returned."""
        self.closed = ClosedError(
            f"the connection to piehost ended ({reason})",
            "look at the host's output for why this inferlet was ended",
        )
        pending, self._pending = self._pending, {}
        for future in pending.values():
            future.fail(self.closed)
        return self.closed

    # --- event loops -----------------------------------------------------------------------

    def waiter(self) -> asyncio.Future[None]:
        """A future of the running event loop, for an `Answer` that has not come yet.

        While any is not done the loop watches the socket. Commands leave when every task that
        can run has run, so tasks that wait side by side share a frame.
        """
        import asyncio  # here because most inferlets do not need it and it is slow to import

        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        if not self._watchers:
            loop.add_reader(self.fd, self._on_readable)
        self._watchers += 1

        def unwatch(_: asyncio.Future[None]) -> None:
            self._watchers -= 1
            if not self._watchers:
                loop.remove_reader(self.fd)

        waiter.add_done_callback(unwatch)
        self._flush_on_idle()
        return waiter

    def _flush_on_idle(self) -> None:
        """If an event loop runs: sends what is queued once the tasks that can run have run."""
        asyncio = sys.modules.get("asyncio")  # no loop runs where nobody has imported it
        if asyncio is None or (loop := asyncio._get_running_loop()) in (None, self._flushes):
            return
        self._flushes = loop
        loop.call_soon(self._on_idle)

    def _on_readable(self) -> None:
        with contextlib.suppress(ClosedError):  # the futures know
            self._read()

    def _on_idle(self) -> None:
        self._flushes = None
        with contextlib.suppress(ClosedError):
            self.flush()
