"""The documents say what is so: their programs run, their tables match the code."""

from __future__ import annotations

import re
import runpy
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from inferlet import abi, errors

from piehost.host.client import Client
from piehost.wire.client import Message

from .host_harness import Terminal, eventually
from .pytest_harness import run_pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
ABI = (ROOT / "docs" / "abi.md").read_text()


def block(language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert len(found) == 1
    return str(found[0])


def test_the_python_program_of_the_readme(terminal: Terminal, tmp_path: Path) -> None:
    script = tmp_path / "my_inferlet.py"
    script.write_text(block("python"))
    assert script.read_text() == (ROOT / "inferlets/context_completion/main.py").read_text()
    done = terminal.run("launch", script, "--", "--prompt", "The capital of France is", check=0)
    assert done.stdout.startswith(b" Paris.")


def test_the_agent_of_the_readme_of_the_python_binding(client: Client, tmp_path: Path) -> None:
    page = (ROOT / "bindings/python/README.md").read_text()
    found = re.search(r"```python\n([^`]*?)```\n\n```text\n(.*?)```", page, re.DOTALL)
    assert found, "the program with its output"
    script = tmp_path / "agent.py"
    script.write_text(found[1])
    done = client.launch(script, user="readme").result()
    assert (done.code, done.text) == (0, found[2]), done.stderr.decode()


def test_the_c_program_of_the_readme(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "hello.c").write_text(block("c"))
    command = re.search(r"`(cc -static .*?)`", README)
    assert command
    words = command[1].replace("hello", str(tmp_path / "hello")).split()
    subprocess.run(words, cwd=ROOT, check=True)
    done = terminal.run("launch", tmp_path / "hello", check=0)
    assert done.stdout == b" Paris.\n"


def test_the_examples_of_the_page_on_testing(terminal: Terminal, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "testing.md").read_text()
    files = dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)```", page, re.DOTALL | re.MULTILINE))
    assert len(files) == page.count("```") // 2, "each listing is a file"
    folder = tmp_path / "project"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    done = run_pytest(folder, terminal.environment, tmp_path / "site")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 passed" in done.stdout


def test_the_programs_of_the_page_on_contexts(client: Client, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "contexts.md").read_text()
    listing = r"^`(\w+\.py)`:\n\n```python\n(.*?)```\n(?:\n```text\n(.*?)```)?"
    programs = re.findall(listing, page, re.DOTALL | re.MULTILINE)
    assert len(programs) == page.count("```python") and page.count("```text") == len(programs) - 1
    for name, text, output in programs:
        (tmp_path / name).write_text(text)
        done = client.launch(tmp_path / name, user="docs").result()
        assert (done.code, done.text) == (0, output), (name, done.stderr.decode())


def test_the_session_of_the_page_on_operations(terminal: Terminal, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    for name, text in re.findall(
        r"^`([\w.]+)`:\n\n```\w+\n(.*?)```", page, re.DOTALL | re.MULTILINE
    ):
        (tmp_path / name).write_text(text)
    commands = re.findall(r"^\$ piehost (.*)\n((?:(?!\$|```).*\n)*)", page, re.MULTILINE)
    assert len(commands) == page.count("$ piehost ") > 5
    options = ("--model", "scripted", "--config", tmp_path / "piehost.toml")
    with terminal.server(*options) as server, server.client() as client:
        run = client.launch(tmp_path / "agent.py", user="ada")
        assert next(event.data for event in run.events() if isinstance(event, Message)) == b"ready"
        for command, output in commands:
            assert eventually(partial(prints, terminal, command, output)), command


def prints(terminal: Terminal, command: str, output: str) -> bool:
    """Whether it is what `piehost COMMAND` shows, where "..." stands for anything and as much
    space for as little."""
    done = terminal.run(*command.split())
    parts = [r"\s+".join(map(re.escape, part.split())) for part in output.split("...")]
    pattern = r"\s*" + r".*".join(parts) + r"\s*"
    shown = (done.stdout + done.stderr).decode()
    return re.fullmatch(pattern, shown, re.DOTALL) is not None


@pytest.mark.parametrize(
    "page",
    [
        *("README.md", "CONTRIBUTING.md", "bindings/python/README.md", "bindings/c/README.md"),
        *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*")),
    ],
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def test_the_tree_of_the_readme_names_real_files() -> None:
    tree = re.search(r"## What is where\n\n```\n(.*?)```", README, re.DOTALL)
    assert tree
    folder = ""
    for line in tree[1].splitlines():
        if line[0] != " ":
            head = line[:23]
            folder = head.split()[0]
            assert all((ROOT / name).exists() for name in head.split()), head
        for name in re.findall(r"\b\w+\.(?:py|h|c)\b", line[23:]):
            assert list((ROOT / folder).rglob(name)), f"{folder}{name}"


def test_the_command_table_is_the_abi() -> None:
    rows = re.findall(r"^\| (\d+) \| (\w+) \|", ABI, re.MULTILINE)
    documented = {int(op): name for op, name in rows if int(op) and name not in _error_names()}
    ops = {}
    for command in abi.Command.__subclasses__():
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", command.__name__).lower()
        ops[command.__struct_config__.tag] = name.replace("kv_page", "kvpage")
    assert documented == ops


def test_the_error_table_is_the_abi() -> None:
    rows = re.findall(r"^\| (\d+) \| (\w+) \|", ABI, re.MULTILINE)
    documented = {int(code): name for code, name in rows if name in _error_names()}
    assert documented == {code: kind.name for code, kind in errors.BY_CODE.items()}


@pytest.mark.parametrize("command", abi.Command.__subclasses__(), ids=lambda c: str(c.__name__))
def test_the_bounds_of_a_command_are_in_its_row(command: type[abi.Command]) -> None:
    """Beyond them a frame ends its inferlet, so they have to be told."""
    info = msgspec.inspect.type_info(command)
    assert isinstance(info, msgspec.inspect.StructType)
    commands = ABI[ABI.index("## 8. Commands") : ABI.index("## 9. Errors")]
    row = re.search(rf"^\| {info.tag} \| .*", commands, re.MULTILINE)
    assert row
    for field in info.fields[1:]:
        for bound in _bounds(field.type):
            assert bound in row[0], f"{field.name}: {bound}"


def _bounds(kind: Any) -> list[str]:
    """Upper bounds as the document writes them, but for those of types that it gives a name."""
    found: list[str] = []
    for inner in [*getattr(kind, "types", ()), getattr(kind, "item_type", None)]:
        found += _bounds(inner) if inner is not None else []
    if isinstance(kind, msgspec.inspect.FloatType) and kind.le is not None:
        found.append({1.0: "to 1)", 1e6: "10\u2076)"}[kind.le])
    elif isinstance(kind, msgspec.inspect.IntType):
        found += [f"to {kind.le}"] if kind.le is not None and kind.le < _NAMED_INTS else []
    elif (most := getattr(kind, "max_length", None)) is not None and (
        not isinstance(kind, msgspec.inspect.StrType) or most != abi.MAX_TOPIC_BYTES
    ):
        found.append(f"{most:,}")
    return found


_NAMED_INTS = 0x7FFFFFFF  # u32, u64, handle and position have their bounds above the table


def test_the_limits_of_the_abi_are_the_code() -> None:
    for number in (abi.MAX_FRAME_BYTES, abi.MAX_COMMANDS_PER_FRAME):
        assert f"{number:,}" in ABI
    for fd in (abi.SOCKET_FD, abi.RING_OUT_FD, abi.RING_IN_FD, abi.STARTUP_FD, abi.VOCAB_FD):
        assert re.search(rf"^\| {fd} \|", ABI, re.MULTILINE)


def test_the_page_of_the_command_line_is_fresh() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "write_cli_docs.py"))["page"]()
    written = (ROOT / "docs" / "cli.md").read_text()
    assert written == page, "run: python scripts/write_cli_docs.py"


def _error_names() -> set[str]:
    return {kind.name for kind in errors.BY_CODE.values()}
