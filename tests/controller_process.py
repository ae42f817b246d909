"""A real controller process for tests: the test plays the host, inferlets and a toy accelerator."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
from inferlet import abi
from tokenizers import Tokenizer, models, pre_tokenizers

from piehost.host.shm.memfd import sealed_memfd
from piehost.wire import control
from piehost.wire.link import Link
from piehost.wire.step import Step

from .toy_device import HIDDEN_SIZE, ToyDevice

VOCAB = 1000
PAGE = 8
LIMITS = abi.Limits(
    kv_pages=64,
    embeds=1024,
    tokens=256,
    commands=4096,
    frame_bytes=65536,
    top_k=VOCAB,
    ring_bytes=65536,
    ring_in_bytes=65536,
    history=4096,
    export_pages=32,
    children=4,
    subscriptions=16,
    http_streams=4,
    store_bytes=65536,
)


def tokenizer_json(unknown: bool) -> bytes:
    """Words w0 to w999; w0 stands for unknown ones, or none does."""
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0" if unknown else "absent"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer.to_str().encode()


class Peer:
    """One inferlet's end of its connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._data = b""
        self._answers: dict[int, list[Any]] = {}
        self.frames = 0
        self.order: list[int] = []  # request ids as they were answered
        self._next = 0

    def request(self) -> int:
        self._next += 1
        return self._next

    def put(self, *commands: abi.Command | list[Any]) -> None:
        body = msgspec.msgpack.encode(list(commands))
        self.sock.sendall(abi.frame_header(len(body)) + body)

    def ask(self, command: abi.Command, timeout: float = 10.0) -> Any:
        """Sends one command and returns its answer's value; an error answer is raised."""
        assert command.req is not None
        self.put(command)
        return self.wait(command.req, timeout)

    def wait(self, request: int, timeout: float = 10.0) -> Any:
        while request not in self._answers:
            ready, _, _ = select.select([self.sock], [], [], timeout)
            assert ready, f"no answer to request {request}"
            data = self.sock.recv(1 << 16)
            if not data:
                raise EOFError
            self._data += data
            self._split()
        return result(self._answers.pop(request))

    def arrived(self) -> list[int]:
        """The requests answered so far, without waiting."""
        while select.select([self.sock], [], [], 0)[0] and (data := self.sock.recv(1 << 16)):
            self._data += data
            self._split()
        return self.order

    def answered(self, request: int) -> bool:
        return request in self._answers

    def _split(self) -> None:
        while len(self._data) >= 2:
            head = 2 if self._data[0] == 0 else 9
            if len(self._data) < head:
                return
            size = self._data[1] if head == 2 else int.from_bytes(self._data[1:9], "big")
            if len(self._data) < head + size:
                return
            body, self._data = self._data[head : head + size], self._data[head + size :]
            self.frames += 1
            for answer in msgspec.msgpack.decode(body):
                assert answer[1] not in self._answers, "one answer a request"
                self._answers[answer[1]] = answer
                self.order.append(answer[1])


class AnswerError(Exception):
    def __init__(self, code: int, message: str, hint: str) -> None:
        super().__init__(f"{code}: {message} (try: {hint})")
        self.code, self.message, self.hint = code, message, hint


def result(answer: list[Any]) -> Any:
    if answer[0] == abi.ANSWER_OK:
        return answer[2]
    raise AnswerError(*answer[2:])


class ControllerProcess:
    """`auto`: the toy accelerator answers each step; else the test calls `serve`."""

    def __init__(
        self,
        pages: int = 64,
        policy: str = "work-conserving",
        chunk: int = 64,
        step: int = 512,
        unknown: bool = True,
        traits: Sequence[str] = ("Forward", "InputEmbed", "OutputEmbed"),
        tokenizer: bytes | None = None,
        chat_template: str | None = None,
        special_tokens: dict[str, str] | None = None,
        swap_pages: int = 0,
    ) -> None:
        host, host_end = socket.socketpair()
        backend, backend_end = socket.socketpair()
        fds = (host_end.fileno(), backend_end.fileno())
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "piehost.controller"),
                *("--host-fd", str(fds[0]), "--backend-fd", str(fds[1])),
            ],
            pass_fds=fds,
        )
        host_end.close()
        backend_end.close()
        self.host: Link[Any] = Link(host, control.ControllerToHost)
        self.backend: Link[Step] = Link(backend, Step)
        self.device = ToyDevice(PAGE, VOCAB)
        self.waiting: list[Step] = []
        self.inbox: list[Any] = []
        self._seats = 0
        self._peers: list[Peer] = []
        self.model = abi.ModelInfo(
            name="toy",
            description="",
            traits=[*traits],
            architecture="toy",
            page_size=PAGE,
            vocab_size=VOCAB,
            hidden_size=HIDDEN_SIZE,
            max_context=512,
            bos_token=None,
            eos_tokens=[0],
            chat_template=chat_template,
        )
        fd = sealed_memfd("tokenizer", tokenizer or tokenizer_json(unknown))
        self.host.send(
            control.Configure(
                self.model,
                pages,
                256,
                512,
                policy=policy,
                chunk_tokens=chunk,
                step_tokens=step,
                special_tokens=special_tokens or {},
                swap_pages=swap_pages,
            ),
            [fd],
        )
        os.close(fd)

    def admit(
        self,
        user: str = "",
        job: str = "",
        parent: int = 0,
        child: int = 0,
        rates: control.Rates | None = None,
        **limits: int,
    ) -> tuple[int, Peer]:
        self._seats += 1
        ours, theirs = socket.socketpair()
        merged = msgspec.structs.replace(LIMITS, **limits)
        self.device.rings_in[self._seats] = bytearray(merged.ring_in_bytes)
        self.device.rings_out[self._seats] = bytearray(merged.ring_bytes)
        self.host.send(
            control.Admit(
                self._seats,
                f"i{self._seats}",
                merged,
                user,
                job,
                parent,
                child,
                rates or control.Rates(),
            ),
            [theirs.fileno()],
        )
        theirs.close()
        self._peers.append(Peer(ours))
        return self._seats, self._peers[-1]

    def collect(self) -> list[Step]:
        """The unanswered steps, once the controller has done all it can with what was sent."""
        for _ in range(3):  # admitted, read, sent: each takes it one turn of its loop at most
            self.stats()
        self._receive(0)
        return self.waiting

    def _receive(self, timeout: float) -> None:
        if select.select([self.backend.fileno()], [], [], timeout)[0]:
            self.waiting += [message for message, _ in self.backend.receive()]

    def serve(self, count: int = 1) -> list[Step]:
        """Waits for `count` steps, carries them out and answers."""
        done = []
        for _ in range(count):
            if not self.waiting:
                self._receive(timeout=20)
            assert self.waiting, "no step came"
            step = self.waiting.pop(0)
            self.backend.send(self.device.run(step))
            done.append(step)
        return done

    def wait(self, peer: Peer, request: int) -> Any:
        """Serves steps until the request is answered."""
        for _ in range(2000):
            if peer.answered(request):
                break
            patience = 0 if self.waiting else 20
            ready, _, _ = select.select([peer.sock, self.backend.fileno()], [], [], patience)
            assert ready or self.waiting, f"no answer to request {request} and no step"
            if self.backend.fileno() in ready or self.waiting:
                self.serve()
            if peer.sock in ready:
                peer._data += peer.sock.recv(1 << 16)
                peer._split()
        return peer.wait(request)

    def from_host(self, kind: type, timeout: float = 20.0) -> Any:
        """The next message to the host of this kind; earlier others stay."""
        while True:
            for i, message in enumerate(self.inbox):
                if isinstance(message, kind):
                    return self.inbox.pop(i)
            assert select.select([self.host.fileno()], [], [], timeout)[0], f"no {kind.__name__}"
            self.inbox += [message for message, _ in self.host.receive()]

    def stats(self) -> control.Stats:
        self.host.send(control.AskStats(1))
        return self.from_host(control.Stats)

    def release(self, seat: int) -> control.Released:
        self.host.send(control.Release(seat))
        return self.from_host(control.Released)

    def close(self) -> None:
        self.host.close()
        assert self.process.wait(5) == 0, "the controller ends with its host, quietly"
        self.backend.close()
        for peer in self._peers:
            peer.sock.close()
