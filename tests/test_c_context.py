"""The C binding's support layer and the C inferlets: stream, context, whole programs.

The controller is a model that is a hash of what it attends to (`c_driver.Tiny`), or the real one
before a toy accelerator. The programs are built with sanitizers, but for the inferlets.
"""

from __future__ import annotations

import codecs
import os
import random
import sys
import tomllib
from collections.abc import Iterator

import msgspec
import pytest

from . import c_fixtures, toy_device
from .c_contexts import Accelerator
from .c_driver import (
    GREEDY,
    INFERLETS,
    ROOT,
    C,
    Program,
    Tiny,
    answers,
    greedy,
    hexed,
    make,
    startup_block,
    unhex,
)
from .c_driver import LIMITS as C_LIMITS
from .c_fixtures import served
from .controller_process import LIMITS, ControllerProcess

pytestmark = c_fixtures.needs_gcc
program = c_fixtures.started  # the fixture


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    make(C, "all", "drivers")
    make(INFERLETS)


# --- stream --------------------------------------------------------------------------------------


def test_the_stream_never_splits_a_character(program: Program) -> None:
    """Octet tokens of random text, some of it no UTF-8: the same text as Python's decoder gives."""
    rng = random.Random(3)
    texts = ["Zürich € 世界 😀".encode(), b"\xf0\x9f\x98", b"\xed\xa0\x80\xe2\x82A\xff\xc0\xaf"]
    texts += [bytes(rng.choice(b"\x80\x9f\xa0\xbf\xc2\xe0\xe2\xed\xf0\xf4A") for _ in range(60))]
    for text in texts:
        program.do(*(f"push {2 + octet}" for octet in text), "end")
        pieces = [unhex(program.line()).decode() for _ in range(len(text) + 1)]  # each is UTF-8
        assert "".join(pieces) == text.decode(errors="replace")
        if text is texts[0]:  # and each character comes with its last octet
            decoder = codecs.getincrementaldecoder("utf-8")()
            assert pieces == [decoder.decode(bytes([octet])) for octet in text] + [""]
    program.do("push 258", "push 0", "push 999", "end")  # whole, control, none such
    assert [unhex(program.line()).decode() for _ in range(4)] == ["€€€", "", "", ""]
    assert program.end() == 0


# --- context -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 16, 17, 511, 512, 513, 1300])
def test_a_context_goes_on_from_its_text(program: Program, length: int) -> None:
    tiny, thread = served(program)
    prompt = [2 + (i * i) % 256 for i in range(length)]
    program.do("context 0", f"fill_tokens {length} " + " ".join(map(str, prompt)))
    program.do(f"generate 100 {GREEDY} 0 0")
    assert [program.line(), program.line()] == ["ok", "ok"]
    new, last = program.tokens()
    assert (new, last) == (greedy(prompt, 100), "ok")
    assert sum(tiny.forwards) == length + 99
    # Then more text, and on: the last token goes through the model first.
    program.do("fill 6869 0", f"generate 20 {GREEDY} 0 0")
    assert program.line() == "ok"
    prompt += [*new, 2 + ord("h"), 2 + ord("i")]
    assert program.tokens() == (greedy(prompt, 20), "ok")
    assert program.end() == 0
    thread.join()


def test_a_long_text_lies_in_few_blocks_and_wastes_little(program: Program) -> None:
    """The spans of each forward are as many as the blocks: log n of them, not n / 32."""
    tiny, thread = served(program)
    program.do("context 0", "fill_tokens 1 9", f"generate 1000 {GREEDY} 0 0")
    assert [program.line(), program.line()] == ["ok", "ok"]
    assert program.tokens() == (greedy([9], 1000), "ok")
    assert program.end() == 0
    thread.join()
    assert len(tiny.pages) <= 16
    assert 1000 <= 16 * sum(tiny.pages.values()) <= 1250


def test_an_empty_context_has_nothing_to_go_on_from(program: Program) -> None:
    program.do("context 0", f"generate 5 {GREEDY} 0 0")
    assert program.line() == "ok"
    assert program.line().split()[2] == "bad_argument"
    assert program.end() == 0


def test_messages_per_token_stay_below_three_tenths(program: Program) -> None:
    tiny, thread = served(program)
    program.do("context 0", f"fill {b'prompt'.hex()} 1", f"generate 128 {GREEDY} 0 0")
    assert [program.line(), program.line()] == ["ok", "ok"]
    tokens, _ = program.tokens()
    assert program.end() == 0
    thread.join()
    assert len(tokens) == 128
    assert (tiny.frames_in + tiny.frames_out) / 128 <= 0.3


def test_the_next_chain_is_queued_before_the_last_has_ended(program: Program) -> None:
    program.do("context 0", "fill_tokens 1 5", f"generate 96 {GREEDY} 0 0")
    first = [c for c in program.commands() if c[0] == 19]
    assert len(first) == 32
    program.peer.sendall(answers(*([0, c[1], 9] for c in first[:15])))
    assert not program.waiting(0.1)
    program.peer.sendall(answers([0, first[15][1], 9]))
    second = [c for c in program.commands() if c[0] == 19]
    assert len(second) == 32
    assert [c[11] for c in first] == [False] + [True] * 31  # somebody waits for the first token
    assert all(c[11] is True for c in second)
    program.peer.sendall(answers(*([0, c[1], 9] for c in first[16:] + second)))
    third = [c for c in program.commands() if c[0] == 19]
    assert [c[11] for c in third] == [True] * 31 + [False]  # the last brings all with it


def test_a_small_quota_gives_short_chains_that_are_not_held_back() -> None:
    limits = {**C_LIMITS, "commands": 60}
    block = {**msgspec.msgpack.decode(startup_block()), "limits": limits}
    with Program(block=msgspec.msgpack.encode(block)) as p:
        assert p.line() == "ok"
        p.do("context 0", "fill_tokens 1 9", f"generate 40 {GREEDY} 0 0")
        samples = [c for c in p.commands() if c[0] == 19]
        assert 0 < len(samples) <= 20 and not any(c[11] for c in samples)


def test_a_stop_token_ends_the_text_and_may_be_passed(program: Program) -> None:
    _, thread = served(program)
    prompt = [50, 60, 70]
    whole = greedy(prompt, 60)
    stop = next(t for i, t in enumerate(whole) if i >= 20 and t not in whole[:i])
    at = whole.index(stop)
    program.do("context 0", "fill_tokens 3 50 60 70", f"generate 60 {GREEDY} 2 1 {stop} 0")
    assert [program.line(), program.line()] == ["ok", "ok"]
    assert program.tokens() == (whole[:at], "ok")
    program.do(f"generate 10 {GREEDY} 1 {stop} 0")  # it is no part of the text, so it comes again
    assert program.tokens() == ([], "ok")
    program.do(f"append {stop}", f"generate 10 {GREEDY} 1 {stop} 0")
    assert program.line() == "ok"
    assert program.tokens() == (greedy(prompt + whole[: at + 1], 10), "ok")
    assert program.end() == 0
    thread.join()


def test_the_caller_may_end_the_text(program: Program) -> None:
    tiny, thread = served(program)
    whole = greedy([50], 25)
    program.do("context 0", "fill_tokens 1 50", "cut_after 20", f"generate 500 {GREEDY} 0 0")
    assert [program.line(), program.line()] == ["ok", "ok"]
    assert program.tokens() == (whole[:20], "ok")
    program.do("cut_after 0", f"generate 5 {GREEDY} 0 0")
    assert program.tokens() == (whole[20:], "ok")
    assert program.end() == 0
    thread.join()
    assert len(tiny.forwards) < 200  # 500 were never queued


def test_pages_that_a_cut_dropped_are_made_anew(program: Program) -> None:
    """The cancel of a cut may drop an allocation; the context must not write there then."""
    program.do("context 0", "fill_tokens 1 5", "cut_after 16", f"generate 500 {GREEDY} 0 0")
    first = program.commands()
    samples = [c for c in first if c[0] == 19]
    program.peer.sendall(answers(*([0, c[1], 9] for c in samples[:16])))
    cut = program.commands()
    assert cut[0][0] == 7 and cut[-1][0] == 5
    (freed,) = [c[3] for c in cut if c[0] == 9]
    error = [2, "no such kv", "alloc it"]
    program.peer.sendall(answers(*([0, c[1], None] for c in samples[16:]), [1, cut[-1][1], *error]))
    assert [program.line(), program.line()] == ["ok", "ok"]
    assert program.tokens() == ([9] * 16, "ok")
    program.do("cut_after 0", f"generate 40 {GREEDY} 0 0")
    after = program.commands()
    made = [c[3] for c in first + after if c[0] == 8 and c[3] != freed]
    assert freed not in made and {c[5][0] for c in after if c[0] == 17} <= set(made)


def test_a_text_beyond_the_models_context_is_refused() -> None:
    with Program(block=startup_block(max_context=64)) as p:
        assert p.line() == "ok"
        _, thread = served(p)
        p.do("context 0", "fill_tokens 65 " + "9 " * 65, "fill_tokens 60 " + "9 " * 60)
        assert p.line() == "ok"
        line = p.line().split()
        assert line[2] == "bad_position" and "context of 64" in unhex(line[3]).decode()
        assert p.line() == "ok"  # it is still empty, and takes a shorter one
        p.do(f"generate 100 {GREEDY} 0 0")
        assert p.tokens() == (greedy([9] * 60, 4), "ok")  # positions 60 to 63
        p.do(f"generate 100 {GREEDY} 0 0")
        assert p.line().split()[2] == "bad_position"
        assert p.end() == 0
        thread.join()


# --- the inferlets -------------------------------------------------------------------------------


def run_inferlet(
    name: str, args: list[str], launcher: list[str] | None = None, **model: object
) -> tuple[int, bytes, str]:
    """Exit code, what it sent, standard error. Its ring is written through /proc."""
    path = INFERLETS / name / "build" / name
    with Program(path, block=startup_block(args, **model), launcher=launcher) as p:
        tiny = Tiny(p)

        def write_ring(offset: int, data: bytes) -> None:
            fd = os.open(f"/proc/{p.pid}/fd/4", os.O_RDWR)
            os.pwrite(fd, data, offset)
            os.close(fd)

        tiny.ring_write = write_ring
        tiny.serve()
        code = p.exit_code()
        return code, tiny.messages, p.errors()


@pytest.mark.parametrize("name", ["text_completion", "explicit_decode"])
@pytest.mark.parametrize("prompt", ["The capital of France is", "x" * 600])
def test_inferlets_send_the_greedy_text(name: str, prompt: str) -> None:
    tokens = [0] + [2 + octet for octet in prompt.encode()]
    text = bytes(t - 2 for t in greedy(tokens, 40))
    code, sent, said = run_inferlet(name, ["--prompt", prompt, "--max-tokens", "40"])
    assert (code, said) == (0, "")
    assert sent.decode() == text.decode(errors="replace")
    # And the same up to the model's end-of-sequence token, which is not sent.
    eos = greedy(tokens, 40)[11]
    first = greedy(tokens, 40).index(eos)
    code, sent, said = run_inferlet(
        name, ["--prompt", prompt, "--max-tokens", "40"], eos_tokens=[1, eos]
    )
    assert (code, sent.decode()) == (0, text[:first].decode(errors="replace"))


@pytest.mark.parametrize("name", ["text_completion", "explicit_decode"])
@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--prompt", "x"],
        ["--prompt", "x", "--max-tokens"],
        ["--prompt", "x", "--max-tokens", "-1"],
        ["--prompt", "x", "--max-tokens", "1", "--temperature", "hot"],
        ["--prompt", "x", "--max-tokens", "1", "--what", "1"],
    ],
)
def test_inferlets_refuse_a_bad_command_line(name: str, args: list[str]) -> None:
    code, sent, said = run_inferlet(name, args)
    assert (code, sent) == (2, b"")
    assert said.startswith(f"usage: {name} --prompt TEXT")


def test_a_prompt_beyond_the_context_is_reported() -> None:
    args = ["--prompt", "x" * 100, "--max-tokens", "4"]
    code, sent, said = run_inferlet("text_completion", args, max_context=64)
    assert (code, sent) == (1, b"")
    assert said.startswith("text_completion: bad_position: ") and "(try: " in said


# Runs a program that dies at any system call but those named.
FILTER = """
import os, sys, pyseccomp
allowed, refused, path = sys.argv[1:]
f = pyseccomp.SyscallFilter(pyseccomp.KILL_PROCESS)
for name in allowed.split(","):
    f.add_rule(pyseccomp.ALLOW, name)
for name in refused.split(","):
    f.add_rule(pyseccomp.ERRNO(1), name)
f.load()
os.execv(path, [path])
"""


@pytest.mark.parametrize("name", ["text_completion", "explicit_decode"])
def test_inferlets_need_no_system_call_beyond_the_native_profile(name: str) -> None:
    policy = tomllib.loads((ROOT / "host/sandbox/policies/native.toml").read_text())
    allowed = ",".join([*policy["allow"], *policy["when"]])
    # glibc's start asks where the program lies, and takes no for an answer
    launcher = [sys.executable, "-c", FILTER, allowed, "readlink"]
    code, sent, said = run_inferlet(name, ["--prompt", "x", "--max-tokens", "20"], launcher)
    assert (code, said) == (0, "")
    tokens = greedy([0, 2 + ord("x")], 20)
    assert sent.decode() == bytes(t - 2 for t in tokens).decode(errors="replace")


# --- before the real controller ------------------------------------------------------------------


@pytest.fixture
def controller() -> Iterator[ControllerProcess]:
    process = ControllerProcess()
    yield process
    process.close()


def block_for(controller: ControllerProcess) -> bytes:
    startup = {"abi": 1, "id": "i1", "args": [], "models": [controller.model], "limits": LIMITS}
    return msgspec.msgpack.encode(startup)


def toy_greedy(text: list[int], count: int) -> list[int]:
    return toy_device.greedy(text, count, 1000)


@pytest.mark.parametrize("seed", range(3))
def test_a_context_before_the_real_controller(controller: ControllerProcess, seed: int) -> None:
    """Random fills, generations, stops and early ends: every token is the reference's."""
    rng = random.Random(seed)
    seat, peer = controller.admit()
    block = block_for(controller)
    with Program(block=block, connection=peer.sock) as p, Accelerator(controller):
        assert p.line() == "ok"
        p.do("context 0")
        assert p.line() == "ok"
        text: list[int] = []
        for _ in range(8):
            more = [rng.randrange(1000) for _ in range(rng.randint(1, 30))]
            p.do(f"fill_tokens {len(more)} {' '.join(map(str, more))}")
            assert p.line() == "ok"
            text += more
            count, end = rng.randint(1, 60), rng.choice([0, 0, 1, 5, 20])
            want = toy_greedy(text, count)
            stop = rng.choice([[], [rng.choice(want)]])
            kept = want[: want.index(stop[0])] if stop else want
            if end and end <= len(kept):
                kept = want = want[:end]
            elif stop:
                want = kept
            words = " ".join(map(str, [len(stop), *stop]))
            p.do(f"cut_after {end}", f"generate {count} {GREEDY} {words} 0")
            assert p.tokens() == (kept, "ok")
            text += want
            if len(text) > 380:  # of 512
                break
        assert p.end() == 0
    assert controller.release(seat).stats.kv_pages == 0


def test_messages_per_token_before_the_real_controller(controller: ControllerProcess) -> None:
    seat, peer = controller.admit()
    prompt = " ".join(f"w{i}" for i in range(5))
    block = block_for(controller)
    with Program(block=block, connection=peer.sock) as p, Accelerator(controller):
        p.do("context 0", f"fill {hexed(prompt.encode())} 1", f"generate 200 {GREEDY} 0 0")
        assert [p.line() for _ in range(3)] == ["ok"] * 3
        assert p.tokens() == (toy_greedy(list(range(5)), 200), "ok")
        assert p.end() == 0
    stats = controller.release(seat).stats
    assert stats.tokens_out == 200
    assert (stats.frames_in + stats.frames_out) / 200 <= 0.3


def test_an_error_of_the_real_controller_has_its_words(controller: ControllerProcess) -> None:
    _, peer = controller.admit(kv_pages=2)
    block = block_for(controller)
    with Program(block=block, connection=peer.sock) as p, Accelerator(controller):
        p.do("context 0", "fill_tokens 17 " + "9 " * 17, f"generate 4 {GREEDY} 0 0")
        assert [p.line() for _ in range(3)] == ["ok"] * 3
        tokens, last = p.tokens()
        assert tokens == [] and last.split()[2] == "over_quota"
        assert unhex(last.split()[3]) and unhex(last.split()[4])
        assert p.end() == 0
