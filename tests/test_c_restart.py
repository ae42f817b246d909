"""After an error of its queue a context of the C binding goes on with the tokens it had; before the
real controller (`c_contexts.Stand`), or one that the test plays."""

from __future__ import annotations

import random

import msgspec
import pytest

from . import c_fixtures
from .c_contexts import (
    CLOSED,
    Stand,
    Text,
    error_of,
    failure,
    fill,
    generate,
    ok,
    options,
    piece_of,
    start,
    stats_of,
    tokens_of,
)
from .c_contexts import built as built
from .c_contexts import stand as stand
from .c_driver import GREEDY, Program, answers, hexed, startup_block
from .controller_process import VOCAB

pytestmark = c_fixtures.needs_gcc


OPERATIONS = (
    *("fill", "generate", "generate", "trim", "mask", "evict"),
    *("window", "fork", "fork", "use", "use", "join", "destroy"),
)
PROMPT = list(range(100, 130))  # three pages and six slots


def generated(program: Program, count: int) -> tuple[list[int], str]:
    """What a generation gives, and the name of the error that ends it, or "ok"."""
    program.do(f"generate {count} {GREEDY} 0 0")
    tokens, last = program.tokens()
    return tokens, last if last == "ok" else failure(last)[0]


def test_an_error_in_a_chain_is_told_once_and_the_next_call_begins_anew() -> None:
    with Program() as p:
        assert p.line() == "ok"
        p.do("context 0", "fill_tokens 1 5", f"generate 60 {GREEDY} 0 0")
        samples = [c for c in p.commands() if c[0] == 19]
        error = [7, "no pages left", "ask for fewer tokens"]
        failed = ([1, c[1], *error] for c in samples[1:])
        p.peer.sendall(answers([0, samples[0][1], 9], *failed))
        assert [p.line(), p.line()] == ["ok", "ok"]
        tokens, last = p.tokens()
        assert tokens == [9]
        assert failure(last) == ("over_quota", "no pages left", "ask for fewer tokens")
        p.do(f"generate 2 {GREEDY} 0 0")
        again = p.commands()
        assert [c[0] for c in again if c[0] in (3, 4)] == [4, 3]  # another queue
        (embedded,) = [c[4] for c in again if c[0] == 16 and len(c[4]) == 2]
        assert embedded == [5, 9]
        samples = [c for c in again if c[0] == 19]
        p.peer.sendall(answers(*([0, c[1], 7] for c in samples)))
        assert p.tokens() == ([7, 7], "ok")
        assert tokens_of(p) == [5, 9, 7, 7]
        p.do("destroy")
        assert p.end() == 0


def test_what_fell_out_of_the_window_before_an_error_is_not_computed_again() -> None:
    with Program() as p:
        assert p.line() == "ok"
        ok(p, "context 0", "window 4 8")
        fill(p, PROMPT)
        p.do(f"generate 60 {GREEDY} 0 0")
        samples = [c for c in p.commands() if c[0] == 19]
        came = [[0, c[1], 9] for c in samples[:15]]
        p.peer.sendall(answers(*came, *([1, c[1], 7, "no pages", "less"] for c in samples[15:])))
        assert p.tokens()[0] == [9] * 15
        p.do("append 5", "flush")
        embedded = [c[4] for c in p.commands() if c[0] == 16]
        assert embedded == [PROMPT[:4], [9] * 9 + [5]]  # the last one that came sees 8 before it
        assert p.line() == "ok"
        p.do("destroy")
        assert p.end() == 0


def test_a_text_that_does_not_fit_is_there_and_fits_when_it_is_shorter(stand: Stand) -> None:
    with stand.program(kv_pages=3) as p:
        ok(p, "context 0")
        fill(p, PROMPT)  # four pages
        for _ in range(2):
            assert generated(p, 4) == ([], "over_quota")
            assert tokens_of(p) == PROMPT and stats_of(p)[:4] == [30, 0, 0, 0]
        ok(p, "trim 9")
        assert generate(p, 4) == Text(PROMPT[:9]).generate(4)
        assert p.end() == 0
    assert stand.controller.release(stand.seat).stats.kv_pages == 0


def test_a_generation_keeps_the_tokens_that_came(stand: Stand) -> None:
    """And its history goes: there is room for the next."""
    with stand.program(kv_pages=6, history=90) as p:
        ok(p, "context 0")
        fill(p, PROMPT)
        text = Text([*PROMPT])
        for _ in range(4):
            ok(p, f"start 60 {options(presence=0.001)}")
            p.do("run")
            while (line := p.line()).startswith("piece"):
                assert piece_of(line).token == text.generate(1)[0]
            assert failure(line)[0] == "over_quota"
            p.do("next")
            assert piece_of(p.line()).finish == CLOSED
            assert tokens_of(p) == text.tokens
            ok(p, "trim 20")
            text.trim(20)
        assert generate(p, 9) == text.generate(9)
        assert p.end() == 0


def test_what_is_evicted_is_not_computed_again(stand: Stand) -> None:
    with stand.program(kv_pages=6) as p:
        ok(p, "context 0")
        fill(p, PROMPT)
        ok(p, "mask 3 5 0", "evict 8 24")
        text = Text([*PROMPT])
        text.hidden |= {3, 4}
        text.evict(8, 24)
        tokens, name = generated(p, 99)
        assert name == "over_quota" and tokens == text.generate(len(tokens))
        ok(p, "trim 30")
        text.trim(30)
        assert generate(p, 2) == text.generate(2)
        assert stats_of(p)[2] <= 3  # tokens 0 to 7, and 24 on
        ok(p, "mask 0 8 1")
        text.hidden -= set(range(8))
        assert generate(p, 2) == text.generate(2)
        assert error_of(p, "mask 8 9 1")[0] == "bad_argument"  # it was evicted
        assert p.end() == 0


def test_forks_of_a_context_that_began_anew_share_its_pages(stand: Stand) -> None:
    with stand.program(kv_pages=12) as p:
        ok(p, "context 0")
        fill(p, PROMPT)
        assert generated(p, 99)[1] == "over_quota"
        ok(p, "trim 26", "fork 1", "fork 2")
        for at in (1, 2):
            p.do(f"use {at}")
            assert stats_of(p)[2:4] == [4, 3]
            assert generate(p, 3) == Text(PROMPT[:26]).generate(3)
        assert p.end() == 0


def test_an_error_behind_the_last_token_that_is_wanted_is_none(stand: Stand) -> None:
    with stand.program(kv_pages=3) as p:
        ok(p, "context 0")
        fill(p, PROMPT)
        ok(p, start(9), "stop", "trim 20", start(40))
        p.do("next")
        assert failure(p.line())[0] == "over_quota"
        ok(p, start(40), "trim 9")
        assert generate(p, 4) == Text(PROMPT[:9]).generate(4)
        assert p.end() == 0


def test_an_error_that_another_context_met_is_told_by_its_own(stand: Stand) -> None:
    """A fill waits for the others' where embeds are few."""
    with stand.program(kv_pages=8, embeds=12) as p:
        ok(p, "context 0")
        fill(p, PROMPT * 3)
        p.do("use 1")
        ok(p, "context 0")
        fill(p, PROMPT[:9])
        assert generate(p, 3) == Text(PROMPT[:9]).generate(3)
        p.do("use 0")
        assert error_of(p, "append 1")[0] == "over_quota"
        assert tokens_of(p) == PROMPT * 3
        ok(p, "trim 9", "append 1")
        assert generate(p, 3) == Text([*PROMPT[:9], 1]).generate(3)
        assert p.end() == 0


@pytest.mark.parametrize("embeds", [1024, 8])
def test_branches_that_run_out_of_pages_leave_the_context_as_it_was(
    stand: Stand, embeds: int
) -> None:
    with stand.program(kv_pages=17, embeds=embeds) as p:
        ok(p, "context 0")
        fill(p, PROMPT)
        assert error_of(p, f"best_of 3 20 {options('1 0 1 0 7')}")[0] == "over_quota"
        assert tokens_of(p) == PROMPT
        p.do(f"best_of 3 2 {options('1 0 1 0 7')}")
        assert p.line().startswith("mean ") and p.line() == "ok"
        assert tokens_of(p) == PROMPT + Text([*PROMPT]).generate(2)
        assert p.end() == 0


def test_a_context_that_could_not_be_saved_can_be_when_it_fits(stand: Stand) -> None:
    with stand.program(kv_pages=3) as p:
        ok(p, "context 0")
        fill(p, PROMPT)
        assert error_of(p, f"save {hexed(b'n')} nil")[0] == "over_quota"
        ok(p, "trim 20", f"save {hexed(b'n')} nil")
        assert p.end() == 0


def test_without_a_controller_every_call_says_so() -> None:
    with Program() as p:
        assert p.line() == "ok"
        ok(p, "context 0", "fill_tokens 2 5 6")
        p.do(f"generate 4 {GREEDY} 0 0")
        p.commands()
        p.peer.close()
        assert failure(p.line())[0] == "closed"
        for line in ("append 1", "trim 1", "mask 0 1 0", "fork 1", f"generate 4 {GREEDY} 0 0"):
            p.do("use 0")
            assert error_of(p, line)[0] == "closed"
        assert tokens_of(p) == [5, 6]
        p.do("destroy")
        assert p.end() == 0


def test_a_fill_that_fails_appends_nothing() -> None:
    """The controller ends while it waits for the embeds of another."""
    block = msgspec.msgpack.decode(startup_block())
    block["limits"]["embeds"] = 12
    with Program(block=msgspec.msgpack.encode(block)) as p:
        assert p.line() == "ok"
        ok(p, "context 0")
        fill(p, PROMPT)
        p.do("use 1")
        ok(p, "context 0", "append 7")
        p.do("fill_tokens 9 " + "5 " * 9)
        assert p.commands()[-1][0] == 5
        p.peer.close()
        assert failure(p.line())[0] == "closed"
        assert tokens_of(p) == [7] and stats_of(p)[0] == 1
        assert p.end() == 0


@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_lost_wherever_the_pages_run_out(stand: Stand, seed: int) -> None:
    """Random operations on contexts that together need more pages than there are: what fails has
    not happened, but for the tokens of a generation that came before, and nothing else is told."""
    rng = random.Random(seed)
    errors = 0
    with stand.program(kv_pages=10) as p:
        texts = {i: Text([*PROMPT, i]) for i in range(3)}
        for at, text in texts.items():
            p.do(f"use {at}")
            ok(p, "context 0")
            fill(p, text.tokens)

        def done(line: str) -> bool:
            nonlocal errors
            p.do(line)
            if (said := p.line()) == "ok":
                return True
            assert failure(said)[0] == "over_quota", line
            errors += 1
            return False

        def done_tokens(count: int) -> None:
            nonlocal errors
            tokens, name = generated(p, count)
            assert tokens == texts[at].generate(len(tokens))
            assert name == "over_quota" if len(tokens) < count else name == "ok"
            errors += name != "ok"

        for _ in range(120):
            text = texts[at]
            length = len(text.tokens)
            begin = rng.randint(length // 2, length)
            end = rng.randint(begin, length)
            match rng.choice(OPERATIONS):
                case "fill" if length < 40:
                    more = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 8, 20]))]
                    if done(f"fill_tokens {len(more)} {' '.join(map(str, more))}"):
                        text.tokens += more
                case "generate" if 0 < length < 50:
                    done_tokens(rng.choice([1, 9, 20]))
                case "trim" if done(f"trim {end}"):
                    text.trim(end)
                case "mask" if done(f"mask {begin} {end} 0"):
                    text.hidden |= set(range(begin, end))
                case "evict" if done(f"evict {begin} {end}"):
                    text.evict(begin, end)
                case "window":
                    window = rng.choice([(0, 0), (4, 8), (0, 1), (8, 30)])
                    if done(f"window {window[0]} {window[1]}"):
                        text.window = window
                case "fork" if len(texts) < 5:
                    new = next(i for i in range(5) if i not in texts)
                    if done(f"fork {new}"):
                        texts[new] = text.copy()
                case "use":
                    at = rng.choice(list(texts))
                    p.do(f"use {at}")
                case "join" if len(texts) > 2:
                    other = rng.choice([i for i in texts if i != at])
                    if done(f"join {other}"):
                        texts[at] = texts.pop(other)
                case "destroy" if len(texts) > 3:
                    p.do("destroy")
                    del texts[at]
                    at = rng.choice(list(texts))
                    p.do(f"use {at}")
            assert tokens_of(p) == texts[at].tokens
        assert errors
        # Alone it fits; a fill from before may still have to tell that it did not.
        for other in [i for i in texts if i != at]:
            p.do(f"use {other}", "destroy")
            del texts[other]
        p.do(f"use {at}")
        if texts[at].tokens:
            tokens, _ = generated(p, 1)
            assert tokens == texts[at].generate(len(tokens))
            assert generate(p, 5) == texts[at].generate(5)
        assert p.end() == 0
    assert stand.controller.release(stand.seat).stats.kv_pages == 0
