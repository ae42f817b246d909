"""The C binding's generations: pieces, stops, samplers, penalties, branches; before
the real controller and a toy accelerator (`c_contexts.Stand`)."""

from __future__ import annotations

import math

import pytest

from . import c_fixtures
from .c_contexts import (
    CLOSED,
    LENGTH,
    STOP,
    Accelerator,
    Stand,
    Text,
    best_allowed,
    error_of,
    fill,
    generate,
    hidden_state,
    ok,
    options,
    piece_of,
    run,
    start,
    stats_of,
    text_of,
    tokens_of,
)
from .c_contexts import built as built
from .c_contexts import stand as stand
from .c_driver import Program, hexed, unhex
from .c_fixtures import PROMPT, served
from .controller_process import VOCAB, ControllerProcess
from .toy_device import Control, choose, log_probability, token_of

pytestmark = c_fixtures.needs_gcc
program = c_fixtures.prompted  # the fixture


def greedy(count: int) -> list[int]:
    return Text([*PROMPT]).generate(count)


# --- pieces --------------------------------------------------------------------------------------


def test_pieces_come_one_by_one_and_the_last_says_why(program: Program) -> None:
    pieces = run(program, start(40))
    assert [p.token for p in pieces] == [*greedy(40), -1]
    assert "".join(p.text for p in pieces) == text_of(greedy(40))
    assert all(math.isnan(p.logprob) for p in pieces)
    assert [p.finish for p in pieces] == [0] * 40 + [LENGTH]
    program.do("next")
    last = piece_of(program.line())
    assert (last.token, last.text, last.finish) == (-1, "", LENGTH)
    assert tokens_of(program) == PROMPT + greedy(40)
    prompt, generated, _, _, first, rate = stats_of(program)
    assert (prompt, generated, first, rate) == (3, 40, 1, 1)
    assert program.end() == 0


def test_a_stop_token_is_not_part_of_the_context(program: Program) -> None:
    stop = greedy(30)[20]
    pieces = run(program, start(30, f"1 {stop}"))
    assert [p.token for p in pieces] == [*greedy(30)[: greedy(30).index(stop)], -1]
    assert pieces[-1].finish == STOP
    assert tokens_of(program) == PROMPT + greedy(30)[: greedy(30).index(stop)]
    assert program.end() == 0


@pytest.mark.parametrize("count", [1, 33])
def test_a_stop_string_is_cut_off_wherever_it_begins_and_ends(program: Program, count: int) -> None:
    """It spans tokens, another one that begins earlier never becomes whole, and what might have
    been the beginning of one is given out when it turns out not to be."""
    whole = text_of(greedy(40))
    before = len(text_of(greedy(count)))
    stop = whole[before - 2 : before + 3]
    before = whole.index(stop)
    others = [whole[3:9] + "never", stop, "nowhere"]
    program.do(f"stop_strings {len(others)} " + " ".join(hexed(s.encode()) for s in others))
    pieces = run(program, start(40))
    assert "".join(p.text for p in pieces) == whole[:before]
    assert pieces[-1].finish == STOP
    kept = tokens_of(program)[len(PROMPT) :]
    assert kept == greedy(len(kept)) and stop in text_of(kept) and stop not in text_of(kept[:-1])
    text = Text(PROMPT + kept)
    assert generate(program, 9) == text.generate(9)  # it goes on behind them
    assert program.end() == 0


def test_text_held_back_for_a_stop_string_comes_at_the_end(program: Program) -> None:
    whole = text_of(greedy(10))
    program.do(f"stop_strings 2 {hexed((whole[-4:] + 'x').encode())} -")
    pieces = run(program, start(10))
    assert pieces[-1].text == whole[-4:] and pieces[-1].finish == LENGTH
    assert "".join(p.text for p in pieces) == whole
    program.do("stop_strings 1 ff")
    assert error_of(program, start(10))[0] == "bad_argument"  # no UTF-8
    assert program.end() == 0


def test_the_programs_own_predicate_ends_a_generation(program: Program) -> None:
    program.do("stop_when 20")
    pieces = run(program, start(60))
    text = "".join(p.text for p in pieces)
    kept = [p.token for p in pieces]
    assert len(text) >= 20 > len(text_of(kept[:-1])) and text == text_of(kept)
    assert pieces[-1].finish == STOP and kept == greedy(len(kept))
    assert tokens_of(program) == PROMPT + kept
    assert program.end() == 0


def test_another_call_ends_a_generation_behind_what_was_taken(program: Program) -> None:
    ok(program, start(40))
    program.do("next", "next")
    assert [piece_of(program.line()).token for _ in range(2)] == greedy(2)
    fill(program, [8])
    program.do("next")
    assert piece_of(program.line()).finish == CLOSED
    assert tokens_of(program) == [*PROMPT, *greedy(2), 8]
    assert generate(program, 3) == Text([*PROMPT, *greedy(2), 8]).generate(3)
    ok(program, start(40), "stop", "stop", start(1))  # with no token taken, too
    program.do("destroy")
    assert program.end() == 0


def test_next_without_a_generation_is_an_error(program: Program) -> None:
    assert error_of(program, "next")[0] == "bad_argument"
    assert program.end() == 0


def test_a_generation_ends_where_the_models_context_does(program: Program) -> None:
    fill(program, [1] * (512 - len(PROMPT) - 4))
    pieces = run(program, start(40))
    assert len(pieces) == 5 and pieces[-1].finish == LENGTH
    assert error_of(program, start(1))[0] == "bad_position"
    assert error_of(program, "fill_tokens 1 1")[0] == "bad_position"
    ok(program, "rewind 1", start(1))  # it is usable all the same
    program.do("next")
    assert piece_of(program.line()).token >= 0
    assert program.end() == 0


def test_contexts_that_run_together_share_steps(stand: Stand) -> None:
    with stand.program() as p:
        for i in range(4):
            p.do(f"use {i}")
            ok(p, "context 0")
            fill(p, [i])
            ok(p, start(32))
        before = len(stand.controller.device.steps)
        p.do("run_all 4")
        of: dict[str, list[int]] = {}
        while (line := p.line()) != "ok":
            _, which, piece = line.split(" ", 2)
            of.setdefault(which, []).append(piece_of(piece).token)
        for i in range(4):
            assert [t for t in of[str(i)] if t >= 0] == Text([i]).generate(32)
        assert len(stand.controller.device.steps) - before < 2 * 32  # not 4 * 32
        assert p.end() == 0


# --- how to draw ---------------------------------------------------------------------------------


def test_log_probabilities_are_the_models_own(program: Program) -> None:
    pieces = run(program, f"start 20 {options(logprobs=1)}")[:-1]
    text = [*PROMPT]
    for piece in pieces:
        want = log_probability(hidden_state(text), piece.token, VOCAB)
        assert piece.logprob == pytest.approx(want, abs=1e-6)
        text.append(piece.token)
    assert text == PROMPT + greedy(20)
    assert program.end() == 0


def test_penalties_look_at_the_prompt_and_at_what_comes(program: Program) -> None:
    """Repetition at both, presence and frequency at what is generated; a chain, not step by step,
    and again in a second generation, for which all of the first is prompt."""
    control = Control(repetition=1.5, presence=300.0, frequency=40.0)
    words = options(repetition=1.5, presence=300, frequency=40)
    text, count = [*PROMPT], 70
    for _ in range(2):
        control.prompt, control.added = [*text], []
        for _ in range(count):
            token = choose(hidden_state(text), VOCAB, control)
            assert token is not None
            control.added.append(token)
            text.append(token)
        assert [p.token for p in run(program, f"start {count} {words}")][:-1] == control.added
    assert control.added != Text(text[:-count]).generate(count)  # they did change something
    assert program.end() == 0


def test_histories_do_not_pile_up(stand: Stand) -> None:
    with stand.program(history=40) as p:
        ok(p, "context 0")
        fill(p, PROMPT * 5)
        for _ in range(6):
            assert len(run(p, f"start 12 {options(presence=1)}")) == 13
            ok(p, "rewind 12")
        ok(p, f"start 12 {options(presence=1)}")  # and one that is left early
        ok(p, "stop")
        assert len(run(p, f"start 30 {options(presence=1)}")) == 31
        assert p.end() == 0


def test_a_bias_moves_the_choice(program: Program) -> None:
    pieces = run(program, f"start 3 {options(bias='1 77 2000')}")
    assert [p.token for p in pieces] == [77, 77, 77, -1]
    assert program.end() == 0


def test_a_sampler_picks_from_the_distribution(program: Program) -> None:
    program.do("sampler second")
    pieces = run(program, f"start 5 {options(k=4, offset=64)}")[:-1]
    text = [*PROMPT]
    for piece in pieces:
        assert piece.token == (token_of(hidden_state(text), VOCAB) + 1) % VOCAB
        assert piece.logprob == pytest.approx(math.log(0.25), abs=1e-12)
        text.append(piece.token)
    assert tokens_of(program) == text and len(text) == 8
    # Of 256 if it does not say how many: the lowest id of them.
    program.do("sampler low")
    (piece, _) = run(program, start(1))
    first = token_of(hidden_state(text), VOCAB)
    assert piece.token == min((first + i) % VOCAB for i in range(256))
    assert program.end() == 0


def test_a_sampler_may_end_the_text_and_be_wrong(program: Program) -> None:
    program.do("sampler end")
    assert [(p.token, p.finish) for p in run(program, start(9))] == [(-1, STOP)]
    program.do("sampler wrong")
    ok(program, start(9))
    name, message = error_of(program, "next")
    assert name == "bad_argument" and "1000000" in message
    program.do("plain")
    assert tokens_of(program) == PROMPT
    assert generate(program, 9) == greedy(9)  # nothing is lost
    program.do("sampler low")
    for wrong in ("0.5 0 1 0 nil 0 0", options(presence=1), options(k=9, offset=65536)):
        assert error_of(program, f"start 9 {wrong}")[0] == "bad_argument"
    program.do("plain")
    assert error_of(program, f"start 9 {options(k=3)}")[0] == "bad_argument"
    assert program.end() == 0


def test_a_sampler_cannot_see_more_than_the_quota_says(stand: Stand) -> None:
    with stand.program(top_k=10) as p:
        ok(p, "context 0")
        fill(p, PROMPT)
        p.do("sampler low")
        assert error_of(p, f"start 2 {options(k=11)}")[0] == "bad_argument"
        (piece, _) = run(p, start(1))
        first = token_of(hidden_state(PROMPT), VOCAB)
        assert piece.token == min((first + i) % VOCAB for i in range(10))
        assert p.end() == 0


# --- branches ------------------------------------------------------------------------------------


def test_the_best_of_several_has_the_highest_mean_log_probability(program: Program) -> None:
    """With a constraint and with a sampler, each branch has its own places in the rings."""
    warm = "1 0 1 0 nil"
    program.do(f"best_of 3 12 {options(warm)}")
    word, mean = program.line().split()
    assert program.line() == "ok" and word == "mean"
    text, total = Text([*PROMPT]), 0.0
    for token in greedy(12):
        total += log_probability(hidden_state(text.tokens), token, VOCAB)
        text.tokens.append(token)
    assert tokens_of(program) == text.tokens and float(mean) == pytest.approx(total / 12, abs=1e-6)
    assert generate(program, 4) == text.generate(4)

    program.do("constrain any", f"best_of 5 8 {options(warm)}")
    assert program.line().startswith("mean ") and program.line() == "ok"
    for n in range(8):
        text.tokens.append(best_allowed(text.tokens, n))
    assert tokens_of(program) == text.tokens

    program.do("plain", "sampler second", f"best_of 4 6 {options(k=2)}")
    assert float(program.line().split()[1]) == pytest.approx(math.log(0.25), abs=1e-12)
    assert program.line() == "ok"
    for _ in range(6):
        hidden = hidden_state(text.tokens)
        text.tokens.append((token_of(hidden, VOCAB) + 1) % VOCAB)
    assert tokens_of(program) == text.tokens
    assert error_of(program, f"best_of 0 6 {options(k=2)}")[0] == "bad_argument"
    program.do("plain")
    assert error_of(program, start(6).replace("start", "best_of 2"))[0] == "bad_argument"
    assert tokens_of(program) == text.tokens
    assert program.end() == 0


def test_branches_have_their_own_seeds_and_masks() -> None:
    """Before the scripted controller, which sees what is asked for."""
    with Program() as p:
        assert p.line() == "ok"
        tiny, thread = served(p)
        ok(p, "context 0")
        fill(p, PROMPT)
        p.do("constrain any", f"best_of 3 2 {options('0.5 0 1 0 7', offset=8)}")
        assert p.line() == "mean -1" and p.line() == "ok"
        mask = 38  # octets, of a vocabulary of 300
        asked = {(sampling[4], sampling[7]) for sampling in tiny.samples}
        assert asked == {(7, 0), (8, mask), (9, 2 * mask)} and len(tiny.samples) == 6
        assert p.end() == 0
        thread.join()


def test_forty_branches_at_once() -> None:
    """More chains than there are futures: each has fewer steps then."""
    controller = ControllerProcess(pages=512)
    stand = Stand(controller)
    with Accelerator(controller), stand.program(kv_pages=4096) as p:
        ok(p, "context 0")
        fill(p, PROMPT)
        p.do(f"best_of 40 40 {options('1 0 1 0 7')}")
        assert p.line().startswith("mean ") and p.line() == "ok"
        assert tokens_of(p) == PROMPT + greedy(40)
        assert p.end() == 0
    assert controller.release(stand.seat).stats.kv_pages == 0
    controller.close()


def test_gather_waits_for_all_and_tells_the_first_failure(program: Program) -> None:
    program.do(
        "@60 20 0 " + hexed(b"w1 w2") + " 0",
        "@61 44 1 50 " + hexed(b"none"),
        "@62 20 0 " + hexed(b"w3") + " 0",
        "gather 3 60 61 62",
    )
    assert [program.line() for _ in range(3)] == ["tokens 2 1 2", "nil -1", "tokens 1 3"]
    words = program.line().split()
    assert words[2] == "not_found" and b"none" in unhex(words[3])
    assert program.end() == 0


def test_a_chat_is_rendered_by_the_models_template(program: Program) -> None:
    ok(program, f"chat 2 {hexed(b'user')} {hexed(b'3')} {hexed(b'user')} {hexed(b'4')} 1")
    assert tokens_of(program) == [*PROMPT, 3, 4, 9]
    assert generate(program, 5) == Text([*PROMPT, 3, 4, 9]).generate(5)
    assert program.end() == 0
