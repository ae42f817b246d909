"""`generate` with a constraint: what it may say, `choice` and `characters`."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from inferlet import END, ArgumentError, MaskError, characters, choice
from inferlet.constraints import OctetAutomaton
from prompts import PROMPT
from scripted import Host
from scripted_device import EOS, VOCAB_SIZE, continuation

EURO_HEAD = 258  # the token of the first two octets of a euro sign


# --- what a constraint says ----------------------------------------------------------------------


def bits(tokens: list[int]) -> bytes:
    array = np.zeros(VOCAB_SIZE, np.bool_)
    array[tokens] = True
    return np.packbits(array, bitorder="little").tobytes()


def as_array(tokens: list[int]) -> Any:
    array = np.zeros(VOCAB_SIZE, np.bool_)
    array[tokens] = True
    return array


@pytest.mark.parametrize(
    "form", [list, tuple, iter, np.array, as_array, bits, lambda t: bytearray(bits(t))]
)
def test_a_constraint_may_say_it_in_many_forms(host: Host, form: Callable[[Any], Any]) -> None:
    lengths = []

    def allowed(tokens: list[int]) -> Any:
        lengths.append(len(tokens))
        return form([65 + len(tokens)])

    with host.model.context(PROMPT) as context:
        assert "".join(context.generate(5, constraint=allowed)) == "ABCDE"
        assert lengths == [0, 1, 2, 3, 4]
        assert list(context.generate_tokens(3)) == continuation(context.tokens[:-3], 3)


def test_none_allows_all_and_end_ends(host: Host) -> None:
    with host.model.context(PROMPT) as context:
        stream = context.generate_tokens(
            9, constraint=lambda tokens: END if len(tokens) == 4 else None
        )
        assert list(stream) == continuation(PROMPT, 4)
        assert stream.finish_reason == "stop"
        stream = context.generate_tokens(9, constraint=lambda _: END)
        assert list(stream) == [] and stream.finish_reason == "stop"
        assert list(context.generate_tokens(3)) == continuation(context.tokens[:-3], 3)


@pytest.mark.parametrize("nothing", [[], b"\0" * 33, np.zeros(VOCAB_SIZE, np.bool_)])
def test_a_dead_end_is_an_error_that_says_so(host: Host, nothing: Any) -> None:
    with host.model.context(PROMPT) as context:
        stream = context.generate(9, constraint=lambda t: None if len(t) < 2 else nothing)
        with pytest.raises(MaskError, match="allows no token after 2 generated ones"):
            "".join(stream)
        assert stream.finish_reason == "error"
        assert context.tokens == PROMPT + continuation(PROMPT, 2)
        assert list(context.generate_tokens(3)) == continuation(context.tokens[:-3], 3)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (5, ArgumentError),
        ("abc", ArgumentError),
        ([VOCAB_SIZE], ArgumentError),
        ([-1], ArgumentError),
        (["a"], ArgumentError),
        (b"\1", MaskError),
        (np.ones(5, np.bool_), MaskError),
        (np.ones((2, VOCAB_SIZE), np.bool_), MaskError),
        (np.ones(3), ArgumentError),
    ],
)
def test_what_a_constraint_may_not_say(host: Host, wrong: Any, error: type[Exception]) -> None:
    with host.model.context(PROMPT) as context:
        with pytest.raises(error):
            list(context.generate_tokens(3, constraint=lambda _: wrong))
        assert list(context.generate_tokens(3)) == continuation(PROMPT, 3)


# --- choices and characters ----------------------------------------------------------------------


def test_a_choice_is_one_of_its_strings(host: Host) -> None:
    strings = ["red", "reddish", "green", "gr€", "€"]
    seen = set()
    for i in range(40):
        with host.model.context([i, *PROMPT]) as context:
            stream = context.generate(50, constraint=choice(host.model, strings))
            text = "".join(stream)
            seen.add(text)
            assert text in strings and stream.finish_reason == "stop"
            assert context.tokens[-1] != EOS
    assert len(seen) >= 3


def allowed_after(constraint: OctetAutomaton, octets: bytes, *tokens: int) -> set[int]:
    mask = constraint([*octets, *tokens])
    assert isinstance(mask, bytes)
    flags = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    return {int(t) for t in flags.nonzero()[0]}


def test_choices_go_on_inside_of_tokens_and_characters(host: Host) -> None:
    constraint = choice(host.model, ["a€", "ab", "a"])
    assert allowed_after(constraint, b"") == {97}
    # the first two octets of a euro sign are a token of their own, and its octets are too
    assert allowed_after(constraint, b"a") == {0xE2, EURO_HEAD, 98, EOS}
    assert allowed_after(constraint, b"a", EURO_HEAD) == {0xAC}
    assert allowed_after(constraint, b"a\xe2") == {0x82}
    assert constraint([97, 98]) is END
    assert constraint([97, EURO_HEAD, 0xAC]) is END
    other = choice(host.model, ["\u2200"])  # begins with the same octet as the euro sign
    assert allowed_after(other, b"") == {0xE2}
    with pytest.raises(ArgumentError, match="not what the constraint allowed"):
        constraint([100])


def test_characters_of_a_class(host: Host) -> None:
    constraint = characters(host.model, string.digits + "€£", least=2)
    digits = {*string.digits.encode()}
    start = {*digits, 0xE2, EURO_HEAD, 0xC2}
    assert allowed_after(constraint, b"") == start
    assert allowed_after(constraint, b"1") == start
    assert allowed_after(constraint, b"", EURO_HEAD) == {0xAC}
    assert allowed_after(constraint, "1£".encode()) == start | {EOS}
    assert allowed_after(constraint, b"11\xe2") == {0x82}
    assert EOS in allowed_after(characters(host.model, "x", least=0), b"")
    with host.model.context(PROMPT) as context:
        stream = context.generate(31, constraint=constraint)
        text = "".join(stream)
        assert stream.finish_reason == "length" and len(stream.tokens.generated) == 31
        assert len(text) >= 15 and set(text[:-1]) <= set(string.digits + "€£")


def test_wrong_choices_are_refused(host: Host) -> None:
    for wrong in ([], "yes", [""], [1], None):
        with pytest.raises(ArgumentError):
            choice(host.model, wrong)  # type: ignore[arg-type]
    for wrong in ("", None, ["1"]):
        with pytest.raises(ArgumentError):
            characters(host.model, wrong)  # type: ignore[arg-type]
    host.runtime.startup.models[0].eos_tokens = []
    with pytest.raises(ArgumentError, match="no token says that it ends"):
        choice(host.model, ["a", "ab"])
    assert choice(host.model, ["a", "b"])([97]) is END
    assert EOS in allowed_after(choice(host.model, ["a", "ab"], stop=[EOS]), b"a")
