"""A C program of the binding as a real process, with this test as its controller.

`Program` gives it the descriptors that `docs/abi.md` section 1 lists; the test reads its frames
from `peer` and answers as it likes. `Tiny` is a controller that carries out what a context needs.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import msgspec
from inferlet import abi

ROOT = Path(__file__).parents[1]
C = ROOT / "bindings" / "c"
INFERLETS = ROOT / "inferlets" / "c"
TEST_CC = os.environ.get("TEST_CC", "gcc").split()[0]  # also of the Makefile
DRIVER = C / "build" / f"driver.{TEST_CC}"
Command = list[Any]
WAIT_S = 20.0
GREEDY = "0 0 1 0 nil"  # the driver's words for greedy sampling, up to the stop list

MODEL = {
    "name": "tiny",
    "description": "a test's",
    "traits": ["allocate", "forward"],
    "architecture": "None",
    "page_size": 16,
    "vocab_size": 300,
    "hidden_size": 8,
    "max_context": 2048,
    "bos_token": 0,
    "eos_tokens": [1],
    "chat_template": None,
}
LIMITS = {
    "kv_pages": 1024,
    "embeds": 4096,
    "tokens": 64,
    "commands": 16384,
    "frame_bytes": 65536,
    "top_k": 1024,
    "ring_bytes": 4096,
    "ring_in_bytes": 8192,
    "history": 65536,
    "export_pages": 512,
    "children": 8,
    "subscriptions": 64,
    "http_streams": 4,
    "store_bytes": 1 << 33,
}
PIECES = [b"<s>", b"</s>", *(bytes([i]) for i in range(256)), "€".encode() * 3]


def startup_block(args: list[str] | None = None, **model: object) -> bytes:
    startup = {
        "abi": 1,
        "version": "0",
        "id": "c1",
        "user": "tester",
        "job": "c1",
        "deadline": None,
        "args": args or [],
        "models": [{**MODEL, **model}],
        "limits": LIMITS,
    }
    return msgspec.msgpack.encode(startup)


def vocab_table() -> bytes:
    return abi.build_vocab_table(PIECES, [i < 2 for i in range(len(PIECES))])


def make(folder: Path, *targets: str) -> str:
    """What make prints; the folder's targets are up to date then."""
    done = subprocess.run(
        ["make", "-C", str(folder), *targets], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def unhex(text: str) -> bytes:
    return b"" if text == "-" else bytes.fromhex(text)


def hexed(data: bytes) -> str:
    return data.hex() or "-"


def framed(body: bytes) -> bytes:
    return abi.frame_header(len(body)) + body


def answers(*items: list[Any]) -> bytes:
    return framed(msgspec.msgpack.encode(list(items)))


class Program:
    """A running program. `lines` go to its standard input; `output` is standard output; `ring_out`
    and `ring_in` are what it shares with the backend at descriptors 4 and 5."""

    def __init__(
        self,
        path: Path = DRIVER,
        block: bytes | None = None,
        vocab: bytes | None = None,
        ring: bytes = bytes(4096),
        connection: socket.socket | None = None,
        launcher: list[str] | None = None,
    ) -> None:
        """`connection`: the program's end, if the test does not play the controller. `launcher`:
        a command that runs the program, whose path is added to it."""
        self.peer, child = socket.socketpair()
        self.peer.settimeout(WAIT_S)
        if connection:
            child.close()
            child = connection
        argv = [*(launcher or []), str(path)]
        files = []
        for data in (
            ring,
            bytes(LIMITS["ring_in_bytes"]),
            startup_block() if block is None else block,
            vocab_table() if vocab is None else vocab,
        ):
            fd = os.memfd_create("given")
            os.write(fd, data)
            files.append(fd)
        self.ring_out = mmap.mmap(files[0], len(ring))
        self.ring_in = mmap.mmap(files[1], LIMITS["ring_in_bytes"])
        stdin, self._stdin = os.pipe()
        self._stdout, stdout = os.pipe()
        self._stderr, stderr = os.pipe()
        # out of the way of the numbers they are to get
        given = {0: stdin, 1: stdout, 2: stderr, 3: child.detach()}
        given |= dict(zip((4, 5, 6, 7), files, strict=True))
        moved = {n: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64) for n, fd in given.items()}
        self.pid = os.posix_spawn(
            argv[0],
            argv,
            {"PIEHOST_ABI": "1"},
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, n) for n, fd in moved.items()],
            setsigdef=[signal.SIGPIPE],  # which Python ignores
        )
        for fd in [*given.values(), *moved.values()]:
            os.close(fd)
        self._ended: int | None = None
        self._bytes = b""
        self._text = b""

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._ended is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.peer.close()
        self.ring_out.close()
        self.ring_in.close()
        for fd in (self._stdin, self._stdout, self._stderr):
            with contextlib.suppress(OSError):
                os.close(fd)

    def do(self, *lines: str) -> None:
        """Has the driver make these calls."""
        data = "".join(line + "\n" for line in lines).encode()
        while data:
            data = data[os.write(self._stdin, data) :]

    def line(self) -> str:
        """The next line of output."""
        while b"\n" not in self._text:
            more = self._read(self._stdout)
            if not more:
                raise AssertionError(f"the program ended: {self.errors()}")
            self._text += more
        line, self._text = self._text.split(b"\n", 1)
        return line.decode()

    @staticmethod
    def _read(fd: int) -> bytes:
        if not select.select([fd], [], [], WAIT_S)[0]:
            raise AssertionError("the program says nothing")
        return os.read(fd, 65536)

    def errors(self) -> str:
        """Standard error, until its end."""
        text = b""
        while more := self._read(self._stderr):
            text += more
        return text.decode(errors="replace")

    def end(self) -> int:
        """Closes its input; its exit code once it has ended. Sanitizers exit with 1 or a signal."""
        os.close(self._stdin)
        self._stdin = -1
        return self.exit_code()

    def exit_code(self) -> int:
        pidfd = os.pidfd_open(self.pid)
        try:
            assert select.select([pidfd], [], [], WAIT_S)[0], "the program does not end"
        finally:
            os.close(pidfd)
        _, status = os.waitpid(self.pid, 0)
        self._ended = os.waitstatus_to_exitcode(status)
        return self._ended

    def frame(self) -> bytes:
        """The next whole frame it writes, header included. EOFError if there is none."""
        while True:
            for head in (2, 9):
                if len(self._bytes) >= head and self._bytes[0] == (0 if head == 2 else 2):
                    size = int.from_bytes(self._bytes[1:head], "big")
                    if len(self._bytes) >= head + size:
                        frame = self._bytes[: head + size]
                        self._bytes = self._bytes[head + size :]
                        return frame
            more = self.peer.recv(1 << 20)
            if not more:
                raise EOFError
            self._bytes += more

    def commands(self) -> list[Command]:
        """The commands of the next frame, checked against the ABI's types."""
        frame = self.frame()
        body = frame[2:] if frame[0] == 0 else frame[9:]
        assert len(body) <= abi.MAX_FRAME_BYTES
        msgspec.msgpack.decode(body, type=abi.Frame)
        commands: list[Command] = msgspec.msgpack.decode(body)
        return commands

    def tokens(self) -> tuple[list[int], str]:
        """The tokens that a `generate` of the driver passes on, and the line after them."""
        tokens = []
        while (line := self.line()).startswith("token "):
            tokens.append(int(line.split()[1]))
        return tokens, line

    def waiting(self, seconds: float) -> bool:
        """Whether a frame (or part of one) comes within `seconds`."""
        return bool(self._bytes) or bool(select.select([self.peer], [], [], seconds)[0])


def next_token(seen: list[tuple[int, int]]) -> int:
    """What the tiny model says after `seen`, (position, token) of all it attends to: 2 to 257."""
    return 2 + zlib.crc32(repr(sorted(seen)).encode()) % 256


def greedy(tokens: list[int], count: int) -> list[int]:
    """The `count` tokens that the tiny model says after `tokens`."""
    seen = list(enumerate(tokens))
    new: list[int] = []
    for _ in range(count):
        new.append(next_token(seen))
        seen.append((len(seen), new[-1]))
    return new


class Tiny:
    """Carries out commands in order on a model that is a hash of what it attends to.

    It knows what a slot and an embed hold, late-bound tokens and stopped ones, and holds lazy
    answers back as the controller may.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.slots: dict[tuple[int, int], tuple[int, int]] = {}
        self.embeds: dict[tuple[int, int], Any] = {}
        self.late: dict[int, int | None] = {}
        self.pages: dict[int, int] = {}
        self.held: list[list[Any]] = []
        self.frames_in = 0
        self.frames_out = 0
        self.messages = b""
        self.forwards: list[int] = []  # inputs of each that was carried out
        self.ring_write: Any = None
        self.samples: list[Any] = []  # the parameters of each, from the temperature on
        self.exports: dict[str, tuple[list[tuple[int, int] | None], bytes]] = {}

    def serve(self) -> None:
        """Serves until the program has ended or waits for nothing that it asked."""
        while True:
            if self.held and not self.program.waiting(0.05):
                self.release()  # as the controller does after a while
            try:
                commands = self.program.commands()
            except (EOFError, ConnectionResetError):
                return
            self.frames_in += 1
            for command in commands:
                self.carry_out(command)

    def release(self) -> None:
        if self.held:
            with contextlib.suppress(BrokenPipeError):
                self.program.peer.sendall(answers(*self.held))
            self.frames_out += 1
            self.held = []

    def carry_out(self, command: Command) -> None:
        op, request, *fields = command
        value = getattr(self, f"op_{op}", lambda *_: None)(*fields)
        if request is not None:
            self.held.append([0, request, value])
            lazy = op == 19 and fields[9]
            if not lazy or len(self.held) == 16:
                self.release()

    def op_1(self, data: bytes) -> None:
        self.messages += data

    def op_8(self, queue: int, kv: int, pages: int) -> None:
        assert pages >= 1 and kv not in self.pages
        self.pages[kv] = pages

    def op_9(self, queue: int, kv: int, first: int, pages: int | None) -> None:
        if pages is None:
            del self.pages[kv]
        else:
            assert pages >= 1 and first + pages <= self.pages[kv]

    def op_11(self, queue: int, source: list[int], target: list[int]) -> None:
        assert source[2] == target[2]
        for i in range(source[2]):
            self.slots[target[0], target[1] + i] = self.slots[source[0], source[1] + i]

    def op_16(self, queue: int, target: list[int], tokens: list[int], at: int) -> None:
        for i, ref in enumerate(tokens):
            token = ref if ref >= 0 else self.late[-1 - ref]
            self.embeds[target[0], target[1] + i] = None if token is None else (at + i, token)

    def op_17(
        self,
        queue: int,
        inputs: list[int],
        reads: list[list[int]],
        write: list[int],
        outputs: list[int] | None,
        positions: None,
        mask: None,
    ) -> None:
        emb, first, count = inputs
        assert count <= 512 and write[2] == count
        assert write[1] + count <= 16 * self.pages[write[0]]
        given = [self.embeds[emb, first + i] for i in range(count)]
        if None in given:  # stopped
            given = [None]
        else:
            seen = [self.slots[kv, start + i] for kv, start, n in reads for i in range(n)]
            seen += given
            for i, pair in enumerate(given):
                self.slots[write[0], write[1] + i] = pair
            given = [next_token(seen)]
            self.forwards.append(count)
        if outputs:
            assert outputs[2] == 1
            self.embeds[outputs[0], outputs[1]] = given[0] if given[0] is None else [given[0]]

    def op_18(self, queue: int, emb: list[int], k: int, offset: int) -> int:
        (token,) = self.embeds[emb[0], emb[1]]
        self.ring_write(offset, struct.pack("<If", token, 1.0))
        return 1

    def op_19(self, queue: int, emb: list[int], token: int, *sampling: Any) -> Any:
        self.samples.append(sampling)
        hidden = self.embeds[emb[0], emb[1]]
        if hidden is None:
            self.late[token] = None
            return None
        value = int(hidden[0])
        self.late[token] = None if value in sampling[5] else value
        logprobs = sampling[13]
        return [value, -1.0, 0] if logprobs else value

    def op_42(
        self, queue: int, name: str, pages: list[list[int]], meta: bytes, lease: None
    ) -> None:
        assert name not in self.exports and len(meta) <= abi.MAX_META_BYTES
        places = [(kv, i) for kv, at, n in pages for i in range(16 * at, 16 * (at + n))]
        self.exports[name] = ([self.slots.get(place) for place in places], meta)

    def op_43(self, name: str) -> None:
        del self.exports[name]

    def op_44(self, queue: int, kv: int, name: str) -> list[Any]:
        slots, meta = self.exports[name]
        self.pages[kv] = len(slots) // 16
        self.slots |= {(kv, i): pair for i, pair in enumerate(slots) if pair is not None}
        return [self.pages[kv], meta]

    def op_45(self, prefix: str, after: str) -> list[list[Any]]:
        names = sorted(n for n in self.exports if n.startswith(prefix) and n > after)
        return [[n, len(self.exports[n][0]) // 16, "c1", None] for n in names[:2]]

    def op_20(self, model: int, text: str, special: bool) -> list[int]:
        return [0] * special + [2 + octet for octet in text.encode()]
