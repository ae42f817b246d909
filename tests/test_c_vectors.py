"""The C binding and the golden vectors: octets for octets, every command, answer, error and block.

The driver is built with the address and undefined behaviour sanitizers, so "exit code 0" says that
there was no wrong access either.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from inferlet import errors

from . import c_fixtures
from .c_driver import LIMITS, C, Program, hexed
from .c_words import ASK, call

VECTORS = C.parent / "vectors"

pytestmark = c_fixtures.needs_gcc
built, program = c_fixtures.built, c_fixtures.started  # the fixtures


def vectors(name: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads((VECTORS / f"{name}.json").read_text())
    return loaded


def kind(value: Any, name: str) -> str:
    """Which of `ASK` an answer is to, by its shape; the vector's name tells empty arrays apart."""
    match value:
        case bool():
            return "bool"
        case str():
            return "text"
        case {"hex": _}:
            return "bytes"
        case dict():
            return "quotas"
        case [{"hex": _}, str()]:
            return "message"
        case [int(), {"hex": _}]:
            return "imported"
        case [int(), dict()]:
            return "response"
        case [int(), float(), int()]:
            return "sampled"
        case [str(), *_]:
            return "names"
        case [list(), *_]:
            return "exports"
        case []:
            return {"no keys": "names", "no exports": "exports"}.get(name, "tokens")
        case list():
            return "tokens"
    return "number"  # or nil


def text(value: str) -> str:
    return hexed(value.encode())


def printed(answer: list[Any], name: str) -> str:
    """What the driver prints for an answer."""
    if answer[0]:
        _, _, code, message, hint = answer
        return f"error {code} {errors.BY_CODE[code].name} {text(message)} {text(hint)}"
    value = answer[2]
    if value is None:
        return "nil -1"
    shown: list[object]
    match kind(value, name):
        case "bytes":
            shown = [value["hex"] or "-"]
        case "bool":
            shown = [int(value)]
        case "text":
            shown = [text(value)]
        case "sampled":
            shown = [value[0], f"{value[1]:.17g}", value[2]]
        case "quotas":
            pairs = [(text(key), f"{left:.17g}") for key, left in value.items()]
            shown = [len(value), *(word for pair in pairs for word in pair)]
        case "message":
            shown = [value[0]["hex"] or "-", text(value[1])]
        case "imported":
            shown = [value[0], value[1]["hex"] or "-"]
        case "names":
            shown = [len(value), *map(text, value)]
        case "response":
            headers = [text(word) for pair in value[1].items() for word in pair]
            shown = [value[0], len(value[1]), *headers]
        case "exports":
            shown = [len(value)]
            for export, pages, exporter, left in value:
                seconds = -1.0 if left is None else left
                shown += [text(export), pages, text(exporter), f"{seconds:.17g}"]
        case "tokens":
            shown = [len(value), *value]
        case _:
            shown = [value]
    return " ".join([kind(value, name), *map(str, shown)])


def test_the_vectors_name_every_command() -> None:
    assert {c[0] for v in vectors("commands") for c in v["commands"]} == set(range(1, 52))


def test_the_vectors_have_every_kind_of_answer_and_every_error() -> None:
    given = [(a, v["name"]) for v in vectors("answers") for a in v["answers"]]
    assert {kind(a[2], name) for a, name in given if not a[0]} == set(ASK)
    assert {a[2] for a, _ in given if a[0]} == set(errors.BY_CODE)


@pytest.mark.parametrize("vector", vectors("commands"), ids=lambda v: v["name"])
def test_commands_are_encoded_as_in_the_vectors(program: Program, vector: dict[str, Any]) -> None:
    program.do(*map(call, vector["commands"]), "flush")
    assert program.line() == "ok"
    if vector["commands"]:
        assert program.frame().hex() == vector["frame_hex"]
    assert program.end() == 0
    with pytest.raises(EOFError):
        program.frame()  # nothing more; and no frame at all for no command


@pytest.mark.parametrize("vector", vectors("answers"), ids=lambda v: v["name"])
def test_answers_are_read_as_in_the_vectors(program: Program, vector: dict[str, Any]) -> None:
    given, name = vector["answers"], vector["name"]
    asked = [f"@{a[1]} {ASK['number' if a[0] else kind(a[2], name)]}" for a in given]
    program.peer.sendall(bytes.fromhex(vector["frame_hex"]))
    # Waited for in another order than they come in.
    program.do(*asked, *(f"wait {a[1]}" for a in reversed(given)))
    assert [program.line() for _ in given] == [printed(a, name) for a in reversed(given)]
    assert program.end() == 0


@pytest.mark.parametrize("vector", vectors("startup"), ids=lambda v: v["name"])
def test_the_startup_block_is_read_as_in_the_vectors(vector: dict[str, Any]) -> None:
    want = vector["startup"]
    lines = [f"{key} {want[key]}" for key in ("id", "version", "user", "job")]
    lines.append("deadline inf" if want["deadline"] is None else f"deadline {want['deadline']!r}")
    lines.append(f"models {len(want['models'])}")
    lines += [f"arg {hexed(arg.encode())}" for arg in want["args"]]
    for m in want["models"]:
        template = "(none)" if m["chat_template"] is None else m["chat_template"]
        bos = -1 if m["bos_token"] is None else m["bos_token"]
        numbers = [m[k] for k in ("page_size", "vocab_size", "hidden_size", "max_context")]
        lines += f"model {m['name']}|{m['description']}|{m['architecture']}|{template}".split("\n")
        lines.append(" ".join(map(str, ["numbers", *numbers, bos])))
        lines.append(" ".join(map(str, ["eos", *m["eos_tokens"]])))
        lines.append(" ".join(["traits", *m["traits"]]))
    lines.append(" ".join(map(str, ["limits", *(want["limits"][k] for k in LIMITS)])))
    with Program(block=bytes.fromhex(vector["block_hex"])) as p:
        assert p.line() == "ok"
        p.do("startup")
        assert [p.line() for _ in lines] == lines
        assert p.end() == 0


@pytest.mark.parametrize("vector", vectors("vocab_table"), ids=lambda v: v["name"])
def test_the_vocabulary_is_read_as_in_the_vectors(vector: dict[str, Any]) -> None:
    with Program(vocab=bytes.fromhex(vector["table_hex"])) as p:
        assert p.line() == "ok"
        p.do("vocab")
        entries = zip(vector["special"], vector["pieces"], strict=True)
        want = [f"{int(special)} {piece or '-'}" for special, piece in entries]
        assert [p.line() for _ in want] == want
        assert p.line() == f"count {len(want)}"
        for pair in vector["detokenize"]:
            p.do(" ".join(map(str, ["detokenize", len(pair["tokens"]), *pair["tokens"]])))
            assert p.line() == (pair["text_hex"] or "-")
        assert p.end() == 0
