"""A scripted controller: the other end of a real socketpair, decoding with the ABI's types.

It keeps enough state to tell right from wrong: KV slots remember the token and position written to
them, a hidden state is the list of what its input attended to, and a sampled token is a function
of that list. So a program that reads a wrong slot gets a wrong token. It runs in a thread, records
every frame, and answers lazy samples in groups of sixteen.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import signal
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from inferlet import Model, Runtime, abi
from inferlet.errors import (
    ArgumentError,
    CancelledError,
    ClosedError,
    HandleError,
    InferletError,
    QuotaError,
    SharedPageError,
    SpanError,
    UnwrittenError,
)

BOS, EOS = 256, 257
PIECES = [bytes([i]) for i in range(256)] + [b"<s>", b"</s>", "\u20ac".encode()[:2]]
VOCAB_SIZE = len(PIECES)
PAGE_SIZE = 8
MAX_CONTEXT = 400
RING_BYTES = 8192

History = tuple[tuple[int, int], ...]  # (position, token) of every slot attended, by position
STOPPED = "stopped"


def next_token(history: History) -> int:
    """A lower-case letter that depends on every attended token and its position."""
    state = 17
    for position, token in history:
        state = (state * 31 + 7 * position + token) % 1_000_003
    return 97 + state % 26


def continuation(
    tokens: Sequence[int], count: int, rule: Callable[[History], int] = next_token
) -> list[int]:
    """What greedy generation must give after `tokens`."""
    all_tokens = list(tokens)
    for _ in range(count):
        all_tokens.append(rule(tuple(enumerate(all_tokens))))
    return all_tokens[len(tokens) :]


@dataclass
class Page:
    holders: int = 1
    slots: list[tuple[int, int, bool] | None] = field(
        default_factory=lambda: [None] * PAGE_SIZE
    )  # (position, token, visible)


class Controller(threading.Thread):
    def __init__(
        self,
        sock: socket.socket,
        ring: mmap.mmap,
        limits: abi.Limits,
        rule: Callable[[History], int] = next_token,
    ) -> None:
        super().__init__(daemon=True)
        self.sock = sock
        self.ring = ring
        self.limits = limits
        self.rule = rule
        self.frames: list[list[Any]] = []  # commands of every frame received
        self.answer_frames = 0
        self.sent: list[bytes] = []  # messages of `send`
        self.inbox: list[bytes] = []  # for `receive`; nothing left is `closed`
        self.broken: list[str] = []  # what only a wrong program does
        self.hold_after: int | None = None  # samples to carry out until a cancel comes
        self.fail_next: tuple[type[abi.Command], InferletError] | None = None
        self.ends_at: type[abi.Command] | None = None  # hangs up when this arrives
        self.samples = 0
        self.kv: dict[int, list[Page | None]] = {}
        self.embs: dict[int, list[Any]] = {}
        self.tokens: dict[int, Any] = {}
        self.queues: dict[int, deque[Any]] = {}
        self.errors: dict[int, InferletError] = {}
        self.owner: dict[tuple[str, int], int] = {}
        self.lazy: list[list[Any]] = []
        self.answers: list[list[Any]] = []
        self.decoder = msgspec.msgpack.Decoder(abi.Frame)

    @property
    def commands(self) -> list[Any]:
        return [command for frame in self.frames for command in frame]

    def of(self, kind: type[abi.Command]) -> list[Any]:
        return [command for command in self.commands if isinstance(command, kind)]

    @property
    def pages_held(self) -> int:
        return len({id(p) for pages in self.kv.values() for p in pages if p is not None})

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
                case _:
                    if command.queue not in self.queues:
                        raise HandleError("no such queue", "create it")
                    self.queues[command.queue].append(command)
        except InferletError as error:
            self._answer(command.req, error)

    def _cancel(self, queue: int) -> None:
        for command in self.queues[queue]:
            self._answer(command.req, CancelledError("cancelled", "queue it again"))
        self.queues[queue].clear()

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
        gives_back = abi.DeallocKvPage | abi.DeallocEmb | abi.DeallocToken
        if queue in self.errors and not isinstance(command, gives_back):
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

    # --- the commands of a queue -----------------------------------------------------------

    def _AllocKvPage(self, c: abi.AllocKvPage) -> None:  # noqa: N802
        if self.pages_held + c.pages > self.limits.kv_pages:
            raise QuotaError(f"{c.pages} pages more than the cap", "free some")
        self._new("kv", c.kv, c.queue)
        self.kv[c.kv] = [Page() for _ in range(c.pages)]

    def _DeallocKvPage(self, c: abi.DeallocKvPage) -> None:  # noqa: N802
        if c.kv not in self.kv:
            raise HandleError(f"no kv {c.kv}", "free it once")
        if c.pages is None and c.first_page == 0:
            self._free("kv", c.kv)
            return
        end = len(self.kv[c.kv]) if c.pages is None else c.first_page + c.pages
        for i in range(c.first_page, end):
            page = self.kv[c.kv][i]
            if page is not None:
                page.holders -= 1
                self.kv[c.kv][i] = None

    def _ShareKvPage(self, c: abi.ShareKvPage) -> None:  # noqa: N802
        self._new("kv", c.kv, c.queue)
        self._slots((c.source, c.first_page * PAGE_SIZE, c.pages * PAGE_SIZE))
        pages = self.kv[c.source][c.first_page : c.first_page + c.pages]
        for page in pages:
            assert page is not None
            page.holders += 1
        self.kv[c.kv] = list(pages)

    def _CopyKvPage(self, c: abi.CopyKvPage) -> None:  # noqa: N802
        if c.source[2] != c.target[2]:
            raise SpanError("lengths differ", "make them equal")
        for (page, i), (target, j) in zip(
            self._slots(c.source), self._slots(c.target, write=True), strict=True
        ):
            target.slots[j] = page.slots[i]

    def _MaskKvPage(self, c: abi.MaskKvPage) -> None:  # noqa: N802
        for page, i in self._slots(c.span, write=True):
            slot = page.slots[i]
            if slot is not None:
                page.slots[i] = (slot[0], slot[1], c.visible)

    def _AllocEmb(self, c: abi.AllocEmb) -> None:  # noqa: N802
        self._new("emb", c.emb, c.queue)
        self.embs[c.emb] = [None] * c.count

    def _DeallocEmb(self, c: abi.DeallocEmb) -> None:  # noqa: N802
        if c.emb not in self.embs:
            raise HandleError(f"no emb {c.emb}", "free it once")
        self._free("emb", c.emb)

    def _DeallocToken(self, c: abi.DeallocToken) -> None:  # noqa: N802
        if c.token not in self.tokens:
            raise HandleError(f"no token {c.token}", "free it once")
        self._free("token", c.token)

    def _EmbedTxt(self, c: abi.EmbedTxt) -> None:  # noqa: N802
        handle, first = c.target
        embs = self._embs((handle, first, len(c.tokens)))
        for i, ref in enumerate(c.tokens):
            token = self.tokens[~ref] if ref < 0 else ref
            if isinstance(token, int) and token >= VOCAB_SIZE:
                raise ArgumentError(f"token {token}", "use a token of the vocabulary")
            position = c.positions + i if isinstance(c.positions, int) else c.positions[i]
            embs[first + i] = STOPPED if token == STOPPED else ("text", token, position)

    def _Forward(self, c: abi.Forward) -> None:  # noqa: N802
        _, first, count = c.inputs
        inputs = self._embs(c.inputs)[first : first + count]
        hidden = [STOPPED] * count if STOPPED in inputs else self._attend(c, inputs)
        if c.outputs:
            _, at, length = c.outputs
            self._embs(c.outputs)[at : at + length] = hidden[count - length :]

    def _attend(self, c: abi.Forward, inputs: list[Any]) -> list[Any]:
        if any(entry is None or entry[0] != "text" for entry in inputs):
            raise UnwrittenError("an input holds no text", "embed_txt it")
        texts = [(position, token) for _, token, position in inputs]
        if c.positions is not None:
            texts = [(p, token) for p, (_, token) in zip(c.positions, texts, strict=True)]
        read = [page.slots[i] for span in c.reads for page, i in self._slots(span)]
        if c.write:
            slots = self._slots(c.write, write=True)
            if len(slots) != len(inputs):
                raise SpanError("the write has another length", "make them equal")
            for (page, i), (position, token) in zip(slots, texts, strict=True):
                page.slots[i] = (position, token, True)
        hidden: list[Any] = []
        width = (len(read) + len(texts) + 7) // 8
        for row, (position, _) in enumerate(texts):
            seen = []
            columns = [*read, *[(p, t, True) for p, t in texts]]
            for column, slot in enumerate(columns):
                if slot is None:
                    continue
                if c.mask is not None:
                    bit = c.mask[row * width + column // 8] >> (column % 8) & 1
                else:
                    bit = slot[2] and slot[0] <= position
                if bit:
                    seen.append((slot[0], slot[1]))
            hidden.append(("hidden", tuple(sorted(seen))))
        return hidden

    def _Sample(self, c: abi.Sample) -> int | None:  # noqa: N802
        entry = self._embs((*c.emb, 1))[c.emb[1]]
        self.samples += 1
        self.owner["token", c.token] = c.queue
        if entry == STOPPED:
            self.tokens[c.token] = STOPPED
            return None
        if entry is None or entry[0] != "hidden":
            raise UnwrittenError("no hidden state", "forward first")
        token = self.rule(entry[1])
        self.tokens[c.token] = STOPPED if token in c.stop else token
        return token

    def _GetNextDist(self, c: abi.GetNextDist) -> int | None:  # noqa: N802
        entry = self._embs((*c.emb, 1))[c.emb[1]]
        if entry == STOPPED:
            return None
        if entry is None or entry[0] != "hidden":
            raise UnwrittenError("no hidden state", "forward first")
        first = self.rule(entry[1])
        ids = [(first + i) % VOCAB_SIZE for i in range(c.k)]
        probs = [2.0 ** -(i + 1) for i in range(c.k)]
        self.ring[c.offset : c.offset + 8 * c.k] = struct.pack(f"<{c.k}I{c.k}f", *ids, *probs)
        return c.k

    # --- tables ----------------------------------------------------------------------------

    def _new(self, kind: str, handle: int, queue: int) -> None:
        table = self.kv if kind == "kv" else self.embs
        if handle in table:
            raise HandleError(f"{kind} {handle} is in use", "choose another")
        self.owner[kind, handle] = queue

    def _free(self, kind: str, handle: int) -> None:
        del self.owner[kind, handle]
        if kind == "kv":
            for page in self.kv.pop(handle):
                if page is not None:
                    page.holders -= 1
        elif kind == "emb":
            del self.embs[handle]
        else:
            del self.tokens[handle]

    def _embs(self, span: abi.Span) -> list[Any]:
        handle, first, length = span
        if handle not in self.embs:
            raise HandleError(f"no emb {handle}", "alloc_emb it")
        if first + length > len(self.embs[handle]):
            raise SpanError("beyond the embeds", "shorten the span")
        return self.embs[handle]

    def _slots(self, span: abi.Span, write: bool = False) -> list[tuple[Page, int]]:
        handle, first, length = span
        if handle not in self.kv:
            raise HandleError(f"no kv {handle}", "alloc_kvpage it")
        pages, slots = self.kv[handle], []
        for at in range(first, first + length):
            if at // PAGE_SIZE >= len(pages) or (page := pages[at // PAGE_SIZE]) is None:
                raise SpanError("beyond the pages", "shorten the span")
            if write and page.holders > 1:
                raise SharedPageError("another handle holds the page", "copy it")
            slots.append((page, at % PAGE_SIZE))
        return slots


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


def startup_block(args: Sequence[str] = (), **limits: int) -> abi.Startup:
    model = abi.ModelInfo(
        name="scripted",
        description="a model that follows a script",
        traits=["Allocate", "Forward", "InputText", "Tokenize", "OutputText"],
        architecture="Scripted",
        page_size=PAGE_SIZE,
        vocab_size=VOCAB_SIZE,
        hidden_size=4,
        max_context=MAX_CONTEXT,
        bos_token=BOS,
        eos_tokens=[EOS],
        chat_template=None,
    )
    caps = {
        "kv_pages": 1000,
        "embeds": 2000,
        "tokens": 1000,
        "commands": 10000,
        "frame_bytes": abi.MAX_FRAME_BYTES,
        "top_k": VOCAB_SIZE,
        "ring_bytes": RING_BYTES,
        **limits,
    }
    return abi.Startup(abi=1, id="test", args=list(args), models=[model], limits=abi.Limits(**caps))


def memfd(name: str, content: bytes) -> int:
    fd = os.memfd_create(name)
    os.write(fd, content)
    return fd


class Host:
    """The descriptors of one inferlet and the scripted controller at their other end."""

    def __init__(
        self,
        args: Sequence[str] = (),
        rule: Callable[[History], int] = next_token,
        **limits: int,
    ) -> None:
        startup = startup_block(args, **limits)
        ours, theirs = socket.socketpair()
        self.inferlet_socket = theirs
        ring_fd = memfd("ring", bytes(startup.limits.ring_bytes))
        self.ring = mmap.mmap(ring_fd, startup.limits.ring_bytes)
        vocab = abi.build_vocab_table(PIECES, [i in (BOS, EOS) for i in range(VOCAB_SIZE)])
        self.fds = [
            theirs.fileno(),
            ring_fd,
            memfd("startup", abi.encoder.encode(startup)),
            memfd("vocab", vocab),
        ]
        self.controller = Controller(ours, self.ring, startup.limits, rule)
        self.controller.start()
        self._runtime: Runtime | None = None

    @property
    def runtime(self) -> Runtime:
        """For a program in this process."""
        if self._runtime is None:
            self._runtime = Runtime(*self.fds)
        return self._runtime

    @property
    def model(self) -> Model:
        return Model(self.runtime, 0)

    def settle(self) -> None:
        """Returns when the controller has carried out everything sent."""
        self.runtime.connection.flush()
        self.model.tokenize("").result()

    def close(self) -> None:
        self.controller.sock.shutdown(socket.SHUT_RDWR)
        self.controller.join(10)
        if self._runtime is not None:
            with contextlib.suppress(ClosedError):  # sees the end, so it never writes again
                self._runtime.connection.poll()
        self.inferlet_socket.close()
        self.controller.sock.close()
        for fd in self.fds[1:]:
            os.close(fd)


@dataclass
class Outcome:
    status: int
    stdout: str
    stderr: str
    sent: list[bytes]
    controller: Controller

    @property
    def text(self) -> str:
        return b"".join(self.sent).decode()


def run_program(
    script: Path,
    args: Sequence[str] = (),
    *,
    tmp_path: Path,
    rule: Callable[[History], int] = next_token,
    inbox: Sequence[bytes] = (),
    env: dict[str, str] | None = None,
    prepare: Callable[[Host], None] | None = None,
) -> Outcome:
    """Runs `script` as piehost does: its own process, descriptors 3, 4, 6 and 7."""
    host = Host(args, rule)
    host.controller.inbox += inbox
    if prepare is not None:
        prepare(host)
    paths = [tmp_path / "stdout", tmp_path / "stderr"]
    outs = [os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY) for path in paths]
    # above every target, so that no duplicate overwrites a source
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in [*outs, *host.fds]]
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, str(script)],
        {
            "PIEHOST_ABI": "1",
            "PYTHONPATH": str(Path(__file__).parent.parent),
            "LANG": "C.UTF-8",
            **(env or {}),
        },
        file_actions=[
            (os.POSIX_SPAWN_DUP2, fd, target)
            for fd, target in zip(high, (1, 2, 3, 4, 6, 7), strict=True)
        ],
    )
    host.inferlet_socket.close()  # so that its end is an end of file
    for fd in [*outs, *high]:
        os.close(fd)
    timer = threading.Timer(60, os.kill, (pid, signal.SIGKILL))
    timer.start()
    try:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        timer.cancel()
    host.controller.join(10)
    outcome = Outcome(
        status, paths[0].read_text(), paths[1].read_text(), host.controller.sent, host.controller
    )
    host.controller.sock.close()
    for fd in host.fds[1:]:
        os.close(fd)
    return outcome


def vectors(name: str) -> list[dict[str, Any]]:
    folder = Path(__file__).parents[2] / "vectors"
    loaded: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text())
    return loaded
