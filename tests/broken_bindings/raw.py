"""A binding in as few lines as will do, and sound. `main.py` breaks one thing of it at a time."""

from __future__ import annotations

import mmap
import os
import struct
from typing import Any

import msgspec

SEND, RECEIVE, CREATE_QUEUE, SYNCHRONIZE, PRIORITY = 1, 2, 3, 5, 6
ALLOC_KV, ALLOC_EMB, DEALLOC_EMB, EMBED, FORWARD, DIST, SAMPLE = 8, 13, 14, 16, 17, 18, 19
TOKENIZE, CHAT = 20, 51
QUEUE, KV, INPUTS, HIDDEN = 1, 1, 1, 2  # handles
SLOTS = 64
PROMPT = "The capital of France is"
QUESTION = [{"role": "user", "content": PROMPT}]


class Failed(Exception):
    def __init__(self, code: int, message: str, hint: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class Binding:
    def __init__(self) -> None:
        self.outbox: list[list[Any]] = []
        self.arrived = bytearray()
        self.answers: dict[int, tuple[Any, Failed | None]] = {}
        self.requests = 0
        self.startup = self.read_startup(os.pread(6, 1 << 20, 0))
        self.model, self.limits = self.startup["models"][0], self.startup["limits"]
        self.ring_in = mmap.mmap(5, self.limits["ring_in_bytes"])

    def read_startup(self, block: bytes) -> Any:
        return msgspec.msgpack.decode(block)

    # --- out -------------------------------------------------------------------------------

    def tell(self, op: int, *fields: Any) -> None:
        """A command without an answer."""
        self.outbox.append([op, None, *fields])

    def post(self, op: int, *fields: Any) -> int:
        self.requests += 1
        self.outbox.append([op, self.new_request(), *fields])
        return self.new_request()

    def new_request(self) -> int:
        return self.requests

    def flush(self) -> None:
        if self.outbox:
            self.write(self.framed(msgspec.msgpack.encode(self.outbox)))
            self.outbox = []

    def framed(self, body: bytes) -> bytes:
        size = len(body)
        return (bytes((0, size)) if size < 256 else struct.pack(">BQ", 2, size)) + body

    def write(self, octets: bytes) -> None:
        while octets:
            octets = octets[os.write(3, octets) :]

    # --- in --------------------------------------------------------------------------------

    def wait(self, request: int) -> Any:
        """The answer's value. Failed for an error."""
        self.flush()
        while request not in self.answers:
            data = os.read(3, 1 << 16)
            if not data:
                self.at_end()
            self.take(data)
        value, error = self.answers.pop(request)
        if error is not None:
            raise error
        return value

    def at_end(self) -> None:
        raise EOFError("the connection is closed")

    def take(self, data: bytes) -> None:
        self.arrived += data
        while len(self.arrived) >= 2:
            head = 9 if self.arrived[0] else 2
            if len(self.arrived) < head:
                return
            size = int.from_bytes(self.arrived[1:head], "big")
            if len(self.arrived) < head + size:
                return
            self.answered(bytes(self.arrived[head : head + size]))
            del self.arrived[: head + size]

    def answered(self, body: bytes) -> None:
        for kind, request, *rest in msgspec.msgpack.decode(body):
            if kind:
                self.answers[request] = None, self.failed(*rest)
            else:
                self.answers[request] = rest[0], None

    def failed(self, code: int, message: str, hint: str) -> Failed:
        return Failed(code, message, hint)

    # --- in both directions ----------------------------------------------------------------

    def ask(self, op: int, *fields: Any) -> Any:
        return self.wait(self.post(op, *fields))

    def attempt(self, op: int, *fields: Any) -> Any:
        """The answer, or the code of the error."""
        try:
            return self.ask(op, *fields)
        except Failed as error:
            return error.code

    def say(self, what: object) -> None:
        self.ask(SEND, f"{what}\n".encode())

    # --- programs --------------------------------------------------------------------------

    def short(self) -> None:
        """Tokenizes a prompt, and says what came of it."""
        self.say(self.attempt(TOKENIZE, 0, PROMPT))

    def prefill(self) -> None:
        """A queue with a prompt in its pages, and the hidden state behind it."""
        tokens = self.ask(TOKENIZE, 0, PROMPT)
        self.tell(CREATE_QUEUE, QUEUE)
        self.tell(ALLOC_KV, QUEUE, KV, SLOTS // self.model["page_size"])
        self.tell(ALLOC_EMB, QUEUE, INPUTS, len(tokens))
        self.tell(ALLOC_EMB, QUEUE, HIDDEN, 1)
        self.tell(EMBED, QUEUE, [INPUTS, 0], tokens)
        span = [INPUTS, 0, len(tokens)]
        self.tell(FORWARD, QUEUE, span, [], [KV, 0, len(tokens)], [HIDDEN, 0, 1])

    def chain(self, steps: int) -> None:
        """Samples one token after the other, which are not looked at."""
        for at in range(steps):
            self.tell(SAMPLE, QUEUE, [HIDDEN, 0], 1)
            self.tell(EMBED, QUEUE, [HIDDEN, 0], [-2], 10 + at)
            span = [HIDDEN, 0, 1]
            self.tell(FORWARD, QUEUE, span, [[KV, 0, 10 + at]], [KV, 10 + at, 1], span)

    def allow(self, octet: int) -> None:
        """A mask at the beginning of ring in: that many octets of it hold allowed tokens."""
        size = -(-self.model["vocab_size"] // 8)
        self.ring_in[:size] = bytes([octet]) * size

    def whole(self) -> None:
        """Something of everything."""
        try:
            while True:
                self.say(self.ask(RECEIVE))
        except Failed as error:
            self.say(error.code)
        requests = [self.post(TOKENIZE, 0, "a b"), self.post(CHAT, 0, QUESTION)]
        self.say([self.wait(request) for request in requests])
        try:
            self.prefill()
            self.chain(3)
            self.allow(0x55)
            requests = [
                self.post(DIST, QUEUE, [HIDDEN, 0], 4, 0),
                self.post(SAMPLE, QUEUE, [HIDDEN, 0], 2, *[0.0, 0, 1.0, 0.0, None, [], False, 0]),
            ]
            self.say([self.wait(request) for request in requests])
            self.say(self.attempt(ALLOC_KV, QUEUE, 9, self.limits["kv_pages"] + 1))
        except Failed as error:
            self.say(error.code)
        self.say(self.attempt(SYNCHRONIZE, QUEUE))
