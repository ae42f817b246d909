"""docs/calls.md is complete and true: every command has a row, and every row names a Python call,
a C call, the wire op and a test that all exist."""

from __future__ import annotations

import ast
import re
import typing
from functools import cache
from pathlib import Path

import inferlet
import msgspec
import pytest
from inferlet import abi

ROOT = Path(__file__).parents[1]
TRAITS = {
    "Runtime", "Allocate", "Forward", "InputText", "InputEmbed", "Tokenize", "OutputText",
    "OutputEmbed",
}  # fmt: skip
_ROW = re.compile(
    r"\| `(\w+)` \| (\w+) \| `([\w.]+)` \| `(\w+)` \| (\d+|–) \| `([\w./-]+)::(\w+)` \|"
)


def _rows() -> list[tuple[str, ...]]:
    lines = (ROOT / "docs" / "calls.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("| `")]
    rows = [_ROW.fullmatch(line) for line in table]
    assert None not in rows, [line for line, row in zip(table, rows, strict=True) if row is None]
    return [row.groups() for row in rows if row]


ROWS = _rows()


@cache
def _header() -> str:
    return (ROOT / "bindings" / "c" / "inferlet.h").read_text()


@cache
def _tests_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in tree.body if isinstance(node, functions)}


def _ops() -> dict[int, str]:
    """Op -> name, as the table of docs/abi.md has them."""
    text = (ROOT / "docs" / "abi.md").read_text().split("## 8. Commands")[1].split("\n## ")[0]
    return {int(op): name for op, name in re.findall(r"^\| (\d+) \| (\w+) \| ", text, re.M)}


def test_every_command_has_a_row() -> None:
    commands = typing.get_args(abi.AnyCommand)
    tags = {msgspec.inspect.type_info(command).tag for command in commands}  # type: ignore[attr-defined]
    assert tags == {int(op) for *_, op, _, _ in ROWS if op != "–"}


def test_no_call_has_two_rows() -> None:
    names = [name for name, *_ in ROWS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_row_names_what_exists(row: tuple[str, ...]) -> None:
    name, trait, python, c, op, path, test = row
    assert trait in TRAITS
    thing: object = inferlet
    for part in python.split("."):
        thing = getattr(thing, part)
    assert re.search(rf"\b{c}\(", _header()), f"{c} is not declared in inferlet.h"
    if op != "–":
        assert _ops()[int(op)] == name
    assert test.startswith("test_")
    assert test in _tests_in(path), f"{path} has no {test}"
