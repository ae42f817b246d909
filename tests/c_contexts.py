"""Contexts of the C driver before the real controller and a toy accelerator that shows what each
token attended to, and the reference for what they should say."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import pytest
from inferlet import abi

from . import toy_device
from .c_driver import GREEDY, C, Program, make, unhex
from .controller_process import LIMITS, PAGE, VOCAB, ControllerProcess

PIECES = [f"{i}.".encode() for i in range(VOCAB)]  # a token's text says its id
VOCABULARY = abi.build_vocab_table(PIECES, [False] * VOCAB)
CHAT_TEMPLATE = (
    "{% for m in messages %}w{{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}w9{% endif %}"
)


class Accelerator(threading.Thread):
    """Carries out the controller's steps until it is told to stop."""

    def __init__(self, controller: ControllerProcess) -> None:
        super().__init__()
        self.controller = controller
        self.stopping = False

    def run(self) -> None:
        while not self.stopping:
            waits = select.select([self.controller.backend.fileno()], [], [], 0.02)[0]
            if waits or self.controller.waiting:
                self.controller.serve()

    def __enter__(self) -> Accelerator:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stopping = True
        self.join()


@dataclass
class Stand:
    """A controller with its accelerator, and programs before it."""

    controller: ControllerProcess
    seat: int = 0

    def program(self, **limits: int) -> Program:
        self.seat, peer = self.controller.admit("", "", 0, 0, None, **limits)
        held = msgspec.structs.replace(LIMITS, **limits)
        startup = {"abi": 1, "models": [self.controller.model], "limits": held}
        program = Program(
            block=msgspec.msgpack.encode(startup),
            vocab=VOCABULARY,
            ring=bytes(LIMITS.ring_bytes),
            connection=peer.sock,
        )
        self.controller.device.rings_in[self.seat] = program.ring_in  # type: ignore[assignment]
        self.controller.device.rings_out[self.seat] = program.ring_out  # type: ignore[assignment]
        assert program.line() == "ok"
        return program


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    make(C, "drivers")


@pytest.fixture
def stand() -> Iterator[Stand]:
    controller = ControllerProcess(chat_template=CHAT_TEMPLATE)
    with Accelerator(controller):
        yield Stand(controller)
    controller.close()


@pytest.fixture
def program(stand: Stand) -> Iterator[Program]:
    """With an empty context."""
    with stand.program() as p:
        ok(p, "context 0")
        yield p


@dataclass
class Text:
    """What a context should be: the reference."""

    tokens: list[int] = field(default_factory=list)
    hidden: set[int] = field(default_factory=set)
    evicted: set[int] = field(default_factory=set)
    window: tuple[int, int] = (0, 0)

    def copy(self) -> Text:
        return Text([*self.tokens], {*self.hidden}, {*self.evicted}, self.window)

    def next_token(self, generated: int) -> int:
        """What the toy model says; `generated` tokens came before in this generation."""
        last = len(self.tokens) - 1
        sink, recent = self.window
        gone = range(sink, last - recent) if recent and generated else range(0)
        seen = [i for i in range(last) if i not in self.hidden and i not in gone]
        return toy_device.next_token(tuple((i, self.tokens[i]) for i in [*seen, last]), VOCAB)

    def generate(self, count: int, stop: int | None = None) -> list[int]:
        """The tokens that join it."""
        new: list[int] = []
        while len(new) < count and (token := self.next_token(len(new))) != stop:
            new.append(token)
            self.tokens.append(token)
        sink, recent = self.window
        if new and recent:
            self.evict(sink, len(self.tokens) - 1 - recent)
        return new

    def evict(self, begin: int, end: int) -> None:
        self.hidden |= set(range(begin, end))
        self.evicted |= set(range(begin, end))

    def trim(self, length: int) -> None:
        del self.tokens[length:]
        self.hidden = {i for i in self.hidden if i < length}
        self.evicted = {i for i in self.evicted if i < length}

    def fewest_pages(self) -> int:
        """Pages that hold a token that may be seen again."""
        return len({i // PAGE for i in range(len(self.tokens)) if i not in self.evicted})


def ok(program: Program, *lines: str) -> None:
    program.do(*lines)
    for line in lines:
        assert program.line() == "ok", line


def failure(line: str) -> tuple[str, str, str]:
    """(name, message, hint) of a line that tells of an error."""
    words = line.split()
    assert words[0] == "error" and unhex(words[4]), line  # with something to try
    return words[2], unhex(words[3]).decode(), unhex(words[4]).decode()


def error_of(program: Program, line: str) -> tuple[str, str]:
    """(name, message) of the error that a line gives."""
    program.do(line)
    return failure(program.line())[:2]


def fill(program: Program, tokens: list[int]) -> None:
    ok(program, f"fill_tokens {len(tokens)} {' '.join(map(str, tokens))}")


def generate(program: Program, count: int, stop: str = "0") -> list[int]:
    program.do(f"generate {count} {GREEDY} {stop} 0")
    tokens, last = program.tokens()
    assert last == "ok"
    return tokens


def tokens_of(program: Program) -> list[int]:
    program.do("tokens_of")
    return [int(word) for word in program.line().split()[2:]]


def stats_of(program: Program) -> list[int]:
    """Prompt tokens, generated ones, pages, shared pages, and whether there are times."""
    program.do("stats")
    return [int(word) for word in program.line().split()[1:]]


@dataclass
class Piece:
    token: int
    text: str
    logprob: float
    finish: int


STOP, LENGTH, CLOSED = 1, 2, 3


def piece_of(line: str) -> Piece:
    word, token, text, logprob, finish = line.split()
    assert word == "piece", line
    return Piece(int(token), unhex(text).decode(), float(logprob), int(finish))


def run(program: Program, start: str) -> list[Piece]:
    """The pieces of a generation that ends well."""
    ok(program, start)
    program.do("run")
    pieces = []
    while (line := program.line()) != "ok":
        pieces.append(piece_of(line))
    return pieces


def start(count: int, stop: str = "0") -> str:
    return f"start {count} {GREEDY} {stop} 0"


def text_of(tokens: list[int]) -> str:
    return b"".join(PIECES[token] for token in tokens).decode()


def options(sampling: str = "", **controls: object) -> str:
    """The words of a sampling from the stop list on, greedy: see `driver_commands.h`."""
    fields = {
        "stop": "0",
        "lazy": 0,
        "mask": "nil",
        "bias": "0",
        "history": "nil",
        "repetition": 1,
        "presence": 0,
        "frequency": 0,
        "logprobs": 0,
        "k": 0,
        "offset": 0,
    }
    assert controls.keys() <= fields.keys()
    return " ".join(map(str, [sampling or GREEDY, *{**fields, **controls}.values()]))


def hidden_state(tokens: list[int]) -> bytes:
    """The vector behind them, with none hidden."""
    return toy_device.vector(tuple(enumerate(tokens)))


def best_allowed(tokens: list[int], generated: int) -> int:
    """What the driver's constraint leaves of it."""
    scores = toy_device.logits(hidden_state(tokens), VOCAB)
    allowed = [t for t in range(VOCAB) if t % 3 == generated % 3]
    return max(allowed, key=lambda t: float(scores[t]))
