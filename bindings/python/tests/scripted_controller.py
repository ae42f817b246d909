"""A scripted controller: the other end of a real socketpair, decoding with the ABI's types.

It keeps enough state to tell right from wrong, so a program that reads a wrong slot gets a wrong
token. It runs in a thread, records every frame, and answers lazy samples in groups of sixteen.
"""

from __future__ import annotations

import contextlib
import mmap
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
from inferlet import abi
from inferlet.errors import CancelledError, ClosedError, HandleError, InferletError
from scripted_device import BOS, Device, History, next_token
from scripted_services import Services

GIVES_BACK = abi.DeallocKvPage | abi.DeallocEmb | abi.DeallocToken | abi.DeallocHistory


class Controller(threading.Thread, Device):
    def __init__(
        self,
        sock: socket.socket,
        ring: mmap.mmap,
        limits: abi.Limits,
        rule: Callable[[History], int] = next_token,
        ring_in: mmap.mmap | None = None,
    ) -> None:
        threading.Thread.__init__(self, daemon=True)
        Device.__init__(self, ring, limits, rule, ring_in)
        self.services = Services(limits, self._answer, self.exports)
        self.sock = sock
        # what a test has happen here, with the next frame: this thread alone may answer
        self.next_frame: deque[Callable[[], object]] = deque()
        self.frames: list[list[Any]] = []  # commands of every frame received
        self.answer_frames = 0
        self.sent: list[bytes] = []  # messages of `send`
        self.inbox: list[bytes] = []  # for `receive`; nothing left is `closed`
        self.broken: list[str] = []  # what only a wrong program does
        self.hold_after: int | None = None  # samples to carry out until a cancel comes
        self.fail_next: tuple[type[abi.Command], InferletError] | None = None
        self.ends_at: type[abi.Command] | None = None  # hangs up when this arrives
        self.queues: dict[int, deque[Any]] = {}
        self.errors: dict[int, InferletError] = {}
        self.lazy: list[list[Any]] = []
        self.answers: list[list[Any]] = []
        self.decoder = msgspec.msgpack.Decoder(abi.Frame)

    @property
    def commands(self) -> list[Any]:
        return [command for frame in self.frames for command in frame]

    def of(self, kind: type[abi.Command]) -> list[Any]:
        return [command for command in self.commands if isinstance(command, kind)]

    def run(self) -> None:
        buffer = bytearray()
        while octets := self._receive():
            buffer += octets
            while (body := take_frame(buffer)) is not None:
                try:
                    frame = self.decoder.decode(body)
                except msgspec.DecodeError as error:
                    self.broken.append(f"bad frame: {error}")
                    break
                self.frames.append(frame)
                for command in frame:
                    if self.ends_at is not None and isinstance(command, self.ends_at):
                        self.sock.shutdown(socket.SHUT_RDWR)
                        return
                    self._take(command)
                self._run_queues()
                while self.next_frame:
                    self.next_frame.popleft()()
                self._flush(self.lazy)
                self._flush(self.answers)

    def _receive(self) -> bytes:
        try:
            return self.sock.recv(1 << 16)
        except OSError:
            return b""

    def send_raw(self, octets: bytes) -> None:
        self.sock.sendall(octets)

    def _flush(self, answers: list[list[Any]]) -> None:
        if answers:
            with contextlib.suppress(BrokenPipeError):  # the inferlet has ended
                self.sock.sendall(framed(abi.encoder.encode(answers)))
            self.answer_frames += 1
            answers.clear()

    def _answer(self, request: int | None, value: object, lazy: bool = False) -> None:
        if request is None:
            return
        if isinstance(value, InferletError):
            answer = [1, request, value.code, value.message, value.hint]
        else:
            answer = [0, request, value]
        if lazy:
            self.lazy.append(answer)
            if len(self.lazy) == 16:
                self._flush(self.lazy)
        else:
            self.answers += [*self.lazy, answer]
            self.lazy.clear()

    def _take(self, command: Any) -> None:
        try:
            match command:
                case abi.Send():
                    self.sent.append(command.data)
                    self._answer(command.req, None)
                case abi.Receive():
                    if not self.inbox:
                        raise ClosedError("the client sends no more", "stop receiving")
                    self._answer(command.req, self.inbox.pop(0))
                case abi.Tokenize():
                    begin = [BOS] if command.special else []
                    self._answer(command.req, begin + list(command.text.encode()))
                case abi.CreateQueue():
                    self.queues[command.queue] = deque()
                    self._answer(command.req, None)
                case abi.DestroyQueue():
                    self._cancel(command.queue)
                    del self.queues[command.queue]
                    for (kind, handle), queue in list(self.owner.items()):
                        if queue == command.queue:
                            self._free(kind, handle)
                case abi.Cancel():
                    self.hold_after = None
                    self._cancel(command.queue)
                case abi.SetQueuePriority():
                    self._answer(command.req, None)
                case _ if self.services.take(command):
                    pass
                case _:
                    if command.queue not in self.queues:
                        raise HandleError("no such queue", "create it")
                    self.queues[command.queue].append(command)
        except InferletError as error:
            self._answer(command.req, error)

    def _cancel(self, queue: int) -> None:
        dropped = [c for c in self.queues[queue] if not isinstance(c, GIVES_BACK)]
        self.queues[queue] = deque(c for c in self.queues[queue] if isinstance(c, GIVES_BACK))
        for command in dropped:
            self._answer(command.req, CancelledError("cancelled", "queue it again"))

    def _run_queues(self) -> None:
        for handle, queue in self.queues.items():
            while queue:
                held = self.hold_after is not None and self.samples >= self.hold_after
                if held and isinstance(queue[0], abi.EmbedTxt | abi.Sample):
                    break
                self._execute(handle, queue.popleft())

    def _execute(self, queue: int, command: Any) -> None:
        if isinstance(command, abi.Synchronize):
            self._answer(command.req, self.errors.pop(queue, None))
            return
        if queue in self.errors and not isinstance(command, GIVES_BACK):
            self._answer(command.req, self.errors[queue])
            return
        try:
            if self.fail_next is not None and isinstance(command, self.fail_next[0]):
                (_, error), self.fail_next = self.fail_next, None
                raise error
            value = getattr(self, "_" + type(command).__name__)(command)
        except InferletError as error:
            self.errors.setdefault(queue, error)
            self._answer(command.req, error)
            return
        self._answer(command.req, value, getattr(command, "lazy", False))


def framed(body: bytes) -> bytes:
    return abi.frame_header(len(body)) + body


def take_frame(buffer: bytearray) -> bytes | None:
    """The body of the first whole frame, taken off `buffer`."""
    if len(buffer) < 2:
        return None
    size, header = buffer[1], 2
    if buffer[0] == abi.FLAG_LONG:
        if len(buffer) < 9:
            return None
        size, header = int.from_bytes(buffer[1:9], "big"), 9
    if len(buffer) < header + size:
        return None
    body = bytes(buffer[header : header + size])
    del buffer[: header + size]
    return body
