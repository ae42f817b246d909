"""The C binding's contexts: trim, mask, evict, window, fork, join, before the real controller and a
toy accelerator (`c_contexts.Stand`).

The driver is built with sanitizers, so "exit code 0" says that there was no wrong access.
"""

from __future__ import annotations

import random

import pytest

from . import c_fixtures
from .c_contexts import (
    Accelerator,
    Stand,
    Text,
    error_of,
    fill,
    generate,
    ok,
    piece_of,
    start,
    stats_of,
    tokens_of,
)
from .c_contexts import built as built
from .c_contexts import program as program
from .c_contexts import stand as stand
from .c_driver import Program, hexed
from .controller_process import VOCAB, ControllerProcess

pytestmark = c_fixtures.needs_gcc


OPERATIONS = (
    *("fill", "fill", "generate", "generate", "generate", "leave", "trim", "mask", "show"),
    *("evict", "window", "fork", "use", "join", "save", "restore"),
)
PROMPT = list(range(100, 130))  # three pages and six slots


# --- random operations ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_operations_sees_what_it_should(stand: Stand, seed: int) -> None:
    """Every token equals the reference's, which knows the tokens and which of them are hidden."""
    rng = random.Random(seed)
    with stand.program(embeds=rng.choice([16, 1024]), kv_pages=2048, export_pages=512) as p:
        texts = {0: Text()}
        ok(p, "context 0")
        saved: dict[str, Text] = {}
        at = 0
        for _ in range(60):
            text = texts[at]
            length = len(text.tokens)
            begin = rng.randint(0, length)
            end = rng.randint(begin, length)
            match rng.choice(OPERATIONS):
                case "fill" if length < 150:
                    more = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 8, 40]))]
                    fill(p, more)
                    text.tokens += more
                case "generate" if 0 < length < 200:
                    count, end = rng.choice([1, 2, 9, 40]), rng.choice([0, 0, 1, 5])
                    if end:  # the caller ends it
                        p.do(f"cut_after {end}")
                        want = text.generate(min(count, end))
                        assert generate(p, count) == want
                        p.do("cut_after 0")
                    else:
                        likely = text.copy().generate(count)
                        stop = rng.choice([None, rng.choice(likely)])
                        want = text.generate(count, stop)
                        words = "0" if stop is None else f"1 {stop}"
                        assert generate(p, count, words) == want
                case "leave" if 0 < length < 200:  # whatever comes next ends it
                    ok(p, start(rng.choice([1, 2, 40])))
                    for token in text.generate(rng.randint(0, 1)):
                        p.do("next")
                        assert piece_of(p.line()).token == token
                case "trim":
                    ok(p, f"trim {end}" if rng.random() < 0.5 else f"rewind {length - end}")
                    text.trim(end)
                case "mask":
                    ok(p, f"mask {begin} {end} 0")
                    text.hidden |= set(range(begin, end))
                case "show" if not text.evicted & set(range(begin, end)):
                    ok(p, f"mask {begin} {end} 1")
                    text.hidden -= set(range(begin, end))
                case "evict" if rng.random() < 0.5:
                    ok(p, f"evict {begin} {end}")
                    text.evict(begin, end)
                case "window":
                    text.window = rng.choice([(0, 0), (4, 8), (0, 1), (8, 30)])
                    ok(p, f"window {text.window[0]} {text.window[1]}")
                case "fork" if len(texts) < 6:
                    new = next(i for i in range(6) if i not in texts)
                    ok(p, f"fork {new}")
                    texts[new] = text.copy()
                case "use":
                    at = rng.choice(list(texts))
                    p.do(f"use {at}")
                case "join" if len(texts) > 1:
                    other = rng.choice([i for i in texts if i != at])
                    ok(p, f"join {other}")
                    texts[at] = texts.pop(other)
                case "save" if length and not text.hidden:
                    name = f"s{len(saved)}"
                    ok(p, f"save {hexed(name.encode())} nil")
                    saved[name] = text.copy()
                case "restore" if saved and len(texts) < 6:
                    name = rng.choice(list(saved))
                    at = next(i for i in range(6) if i not in texts)
                    ok(p, f"restore {at} 0 {hexed(name.encode())}")
                    texts[at] = Text([*saved[name].tokens])
            assert tokens_of(p) == texts[at].tokens
            _, _, pages, shared, *_ = stats_of(p)
            assert shared <= pages
            assert texts[at].fewest_pages() <= pages + 1  # the last token's page may be to come
        for i, text in texts.items():
            if text.tokens:
                p.do(f"use {i}")
                assert generate(p, 5) == text.generate(5)
        assert p.end() == 0
    assert stand.controller.release(stand.seat).stats.kv_pages == 0


# --- one by one ----------------------------------------------------------------------------------


@pytest.mark.parametrize("embeds", [1024, 16, 4])
def test_a_long_prompt_fits_any_quota_of_embeds(stand: Stand, embeds: int) -> None:
    """Each part's embeds are freed before those of the next are made."""
    with stand.program(embeds=embeds) as p:
        ok(p, "context 0")
        prompt = [i * i % VOCAB for i in range(490)]
        fill(p, prompt[:250])
        fill(p, prompt[250:])
        assert generate(p, 5) == Text(prompt).generate(5)
        assert p.end() == 0


@pytest.mark.parametrize("embeds", [1024, 100, 20])
def test_many_contexts_are_filled_at_once(embeds: int) -> None:
    """None is answered before all are filled: together they stay below the quota."""
    controller = ControllerProcess(pages=1024)
    stand = Stand(controller)
    prompts = [[i + j * j % 700 for j in range(300)] for i in range(9)]
    with Accelerator(controller), stand.program(embeds=embeds, kv_pages=1024) as p:
        for i, prompt in enumerate(prompts):
            p.do(f"use {i}")
            ok(p, "context 0")
            fill(p, prompt)
        for i, prompt in enumerate(prompts):
            p.do(f"use {i}")
            assert generate(p, 3) == Text(prompt).generate(3)
        assert p.end() == 0
    controller.close()


def test_a_fork_shares_full_pages_and_goes_its_own_way(stand: Stand) -> None:
    with stand.program() as p:
        ok(p, "context 0")
        fill(p, PROMPT)
        ok(p, "fork 1", "fork 2")
        assert stats_of(p)[2:4] == [4, 3]
        for i in (1, 2):
            p.do(f"use {i}")
            assert stats_of(p)[:4] == [30, 0, 4, 3]
            fill(p, [i])
            assert generate(p, 20) == Text([*PROMPT, i]).generate(20)
        p.do("use 0")
        assert generate(p, 20) == Text([*PROMPT]).generate(20)
        ok(p, "join 2")
        assert tokens_of(p)[:31] == [*PROMPT, 2]
        p.do("destroy", "use 1")
        text = Text(tokens_of(p))
        assert generate(p, 5) == text.generate(5)
        assert p.end() == 0


def test_a_join_of_what_is_no_branch_is_refused(program: Program) -> None:
    fill(program, PROMPT)
    assert error_of(program, "join 0")[0] == "bad_argument"
    assert error_of(program, "join 3")[0] == "bad_handle"
    assert generate(program, 3) == Text([*PROMPT]).generate(3)
    assert program.end() == 0


def test_a_window_bounds_memory(program: Program) -> None:
    """400 tokens with 40 pages of 8 would not fit: sink, window, what is queued ahead."""
    with_window = Text([*PROMPT], window=(4, 16))
    ok(program, "window 4 16")
    fill(program, PROMPT)
    most = 0
    ok(program, start(400))
    for want in with_window.generate(400):
        program.do("next")
        assert piece_of(program.line()).token == want
        most = max(most, stats_of(program)[2])
    assert most <= 24  # 64 tokens ahead are 8 pages; a block is a quarter of what is held
    assert program.end() == 0


def test_an_evicted_token_frees_its_page_only_with_the_others(program: Program) -> None:
    fill(program, PROMPT)
    held = stats_of(program)[2]
    ok(program, "evict 8 12", "evict 13 16")
    assert stats_of(program)[2] == held
    ok(program, "evict 12 13")
    assert stats_of(program)[2] == held - 1
    name, message = error_of(program, "mask 0 9 1")
    assert name == "bad_argument" and "evicted" in message
    assert error_of(program, "mask 20 31 0")[0] == "bad_argument"  # there are 30
    assert error_of(program, "evict 5 4")[0] == "bad_argument"
    text = Text([*PROMPT])
    text.evict(8, 16)
    assert generate(program, 9) == text.generate(9)
    # All of it: what comes sees itself alone.
    ok(program, "trim 24", "evict 0 24")
    assert stats_of(program)[2] <= 1
    text = Text(PROMPT[:24])
    text.evict(0, 24)
    assert generate(program, 9) == text.generate(9)
    assert program.end() == 0


def test_the_page_of_the_last_token_may_be_evicted_before_pages_in_reserve(
    program: Program,
) -> None:
    """A stop leaves pages for the steps that were queued behind it."""
    prompt = PROMPT[:20]
    fill(program, prompt)
    text = Text([*prompt])
    stop = text.copy().generate(5)[4]
    assert generate(program, 40, f"1 {stop}") == text.generate(40, stop)
    assert len(text.tokens) == 24 and stats_of(program)[2] > 3
    ok(program, "evict 0 24")
    text.evict(0, 24)
    assert generate(program, 20) == text.generate(20)
    assert program.end() == 0


def test_a_hidden_token_is_not_seen_by_what_goes_through_the_model_with_it(
    program: Program,
) -> None:
    """The last token of a generation is not written before there is more."""
    fill(program, PROMPT)
    text = Text([*PROMPT])
    for more in ([1], [2, 3, 4]):
        assert generate(program, 2) == text.generate(2)
        last = len(text.tokens) - 1
        ok(program, f"mask {last} {last + 1} 0")
        text.hidden.add(last)
        fill(program, more)
        text.tokens += more
    assert generate(program, 5) == text.generate(5)
    assert program.end() == 0


def test_too_many_runs_of_hidden_tokens_are_refused(program: Program) -> None:
    """Before a forward that could not name them."""
    controller_most = 510
    fill(program, [1] * controller_most)
    ok(program, *(f"mask {i} {i + 1} 0" for i in range(0, controller_most, 2)))
    text = Text([1] * controller_most)
    text.hidden = set(range(0, controller_most, 2))
    assert generate(program, 2) == text.generate(2)
    assert program.end() == 0


@pytest.mark.parametrize("line", ["trim 31", "rewind 31", "append 1000", "append -1"])
def test_what_is_out_of_range_is_refused_and_changes_nothing(program: Program, line: str) -> None:
    fill(program, PROMPT)
    assert error_of(program, line)[0] == "bad_argument"
    assert tokens_of(program) == PROMPT
    assert generate(program, 3) == Text([*PROMPT]).generate(3)
    assert program.end() == 0
