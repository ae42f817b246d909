"""The documents say what is so: their programs run, their tables match the code."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path

import pytest
from inferlet import abi, errors

from .host_harness import Terminal

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


def test_the_c_program_of_the_readme(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "hello.c").write_text(block("c"))
    command = re.search(r"`(cc -static .*?)`", README)
    assert command
    words = command[1].replace("hello", str(tmp_path / "hello")).split()
    subprocess.run(words, cwd=ROOT, check=True)
    done = terminal.run("launch", tmp_path / "hello", check=0)
    assert done.stdout == b" Paris.\n"


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*"))]
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


def test_the_limits_of_the_abi_are_the_code() -> None:
    for number in (
        abi.MAX_FRAME_BYTES,
        abi.MAX_COMMANDS_PER_FRAME,
        abi.MAX_MESSAGE_BYTES,
        abi.MAX_TOKENIZE_BYTES,
    ):
        assert f"{number:,}" in ABI
    for fd in (abi.SOCKET_FD, abi.RING_OUT_FD, abi.STARTUP_FD, abi.VOCAB_FD):
        assert re.search(rf"^\| {fd} \|", ABI, re.MULTILINE)


def test_the_page_of_the_command_line_is_fresh() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "write_cli_docs.py"))["page"]()
    written = (ROOT / "docs" / "cli.md").read_text()
    assert written == page, "run: python scripts/write_cli_docs.py"


def _error_names() -> set[str]:
    return {kind.name for kind in errors.BY_CODE.values()}
