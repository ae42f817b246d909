"""The C binding's constraints, alone and with a sampler; before the real controller and a toy
accelerator (`c_contexts.Stand`)."""

from __future__ import annotations

import math

import pytest

from . import c_fixtures
from .c_contexts import (
    CLOSED,
    LENGTH,
    STOP,
    Text,
    best_allowed,
    error_of,
    failure,
    generate,
    hidden_state,
    ok,
    options,
    piece_of,
    run,
    start,
    tokens_of,
)
from .c_contexts import built as built
from .c_contexts import stand as stand
from .c_driver import Program
from .c_fixtures import PROMPT
from .controller_process import VOCAB
from .toy_device import token_of

pytestmark = c_fixtures.needs_gcc
program = c_fixtures.prompted  # the fixture


def test_a_constraint_says_what_may_come(program: Program) -> None:
    program.do("constrain any")
    pieces = run(program, start(8))
    text = [*PROMPT]
    for n in range(8):
        text.append(best_allowed(text, n))
    assert [p.token for p in pieces] == [*text[3:], -1]
    assert pieces[-1].finish == LENGTH
    assert program.end() == 0


def test_a_constraint_may_end_the_text_or_lead_nowhere(program: Program) -> None:
    program.do("constrain three")
    assert [p.finish for p in run(program, start(9))] == [0, 0, 0, STOP]
    ok(program, "trim 3")
    program.do("constrain dead")
    ok(program, start(9))
    program.do("next", "next", "next")
    taken = [piece_of(program.line()).token for _ in range(3)]
    name, message = error_of(program, "next")
    assert name == "bad_mask" and "after 3 generated" in message
    program.do("plain", "next")
    assert piece_of(program.line()).finish == CLOSED
    assert tokens_of(program) == PROMPT + taken
    assert generate(program, 9) == Text(PROMPT + taken).generate(9)  # it is usable
    assert program.end() == 0


def test_a_constraint_and_a_mask_are_refused(program: Program) -> None:
    program.do("constrain any")
    assert error_of(program, f"start 3 {options(mask=0)}")[0] == "bad_argument"
    assert program.end() == 0


# --- with a sampler ------------------------------------------------------------------------------


def first_allowed(text: list[int], generated: int) -> int:
    """How many of the most probable tokens come before the first that the constraint allows."""
    first = token_of(hidden_state(text), VOCAB)
    return next(i for i in range(VOCAB) if (first + i) % VOCAB % 3 == generated % 3)


def test_a_sampler_gets_what_the_constraint_allows_renormalised(program: Program) -> None:
    """The tokens of the `k` most probable that are allowed, in their order; the log-probability of
    the one it takes is the model's own."""
    k = 9
    program.do("constrain any", "sampler tell")
    ok(program, f"start 6 {options(k=k, mask='nil', offset=8)}")
    text = [*PROMPT]
    for n in range(6):
        program.do("next")
        word, *entries = program.line().split()
        ids, probs = [int(i) for i in entries[::2]], [float(p) for p in entries[1::2]]
        first = token_of(hidden_state(text), VOCAB)
        ranks = [i for i in range(k) if (first + i) % VOCAB % 3 == n % 3]
        assert word == "dist" and ids == [(first + i) % VOCAB for i in ranks]
        whole = sum(2.0**-i for i in ranks)
        assert probs == pytest.approx([2.0**-i / whole for i in ranks], rel=1e-6)
        piece = piece_of(program.line())
        assert piece.token == ids[0]
        assert piece.logprob == pytest.approx(math.log(2.0 ** -(ranks[0] + 1)), abs=1e-6)
        text.append(ids[0])
    program.do("next")
    assert piece_of(program.line()).finish == LENGTH
    assert tokens_of(program) == text
    assert program.end() == 0


def test_no_allowed_token_among_the_most_probable_is_an_error(program: Program) -> None:
    text, generated = [*PROMPT], 0
    program.do("constrain any", "sampler tell")
    while not first_allowed(text, generated):  # one of the next few is not the most probable
        text.append(token_of(hidden_state(text), VOCAB))
        generated += 1
    ok(program, f"start 99 {options(k=1)}")
    for token in text[len(PROMPT) :]:
        program.do("next")
        assert program.line() == f"dist {token} 1"
        assert piece_of(program.line()).token == token
    program.do("next")
    name, message, hint = failure(program.line())
    assert name == "bad_mask" and "none of the 1 most probable" in message and "k" in hint
    program.do("next")
    assert piece_of(program.line()).finish == CLOSED
    assert tokens_of(program) == text
    program.do("plain")
    assert generate(program, 9) == Text([*text]).generate(9)  # it is usable
    assert program.end() == 0


def test_a_sampler_may_not_take_what_the_constraint_forbids(program: Program) -> None:
    program.do("constrain any", "sampler beside")
    ok(program, start(9))
    name, message = error_of(program, "next")
    assert name == "bad_argument" and "the constraint does not allow" in message
    program.do("sampler wrong")
    ok(program, start(9))
    assert error_of(program, "next")[0] == "bad_argument"
    assert tokens_of(program) == PROMPT
    program.do("sampler end")
    assert [(p.token, p.finish) for p in run(program, start(9))] == [(-1, STOP)]
    program.do("sampler three")  # the constraint ends it
    assert [p.finish for p in run(program, start(9))] == [0, 0, 0, STOP]
    assert program.end() == 0


def test_branches_have_their_own_masks_and_distributions(program: Program) -> None:
    program.do("constrain any", "sampler low", f"best_of 3 4 {options(k=6)}")
    assert program.line().startswith("mean ") and program.line() == "ok"
    text = [*PROMPT]
    for n in range(4):
        first = token_of(hidden_state(text), VOCAB)
        ids = [(first + i) % VOCAB for i in range(6)]
        text.append(min(token for token in ids if token % 3 == n % 3))
    assert tokens_of(program) == text
    assert program.end() == 0
