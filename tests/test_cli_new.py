"""`piehost new`: what it writes launches, tests, lints and type-checks, for real."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .host_harness import DEADLINE, PIEHOST, Terminal
from .pytest_harness import ROOT, SDK, run_pytest

NAME = "my-inferlet_2"


def new(terminal: Terminal, folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """`piehost new ARGUMENTS` in `folder`."""
    return subprocess.run(
        [*PIEHOST, "new", *arguments],
        cwd=folder,
        env={**terminal.environment, "PYTHONPATH": os.pathsep.join((str(ROOT), str(SDK)))},
        capture_output=True,
        timeout=DEADLINE,
    )


def checked(*command: str | Path, cwd: Path) -> None:
    environment = dict(os.environ)
    if not list(importlib.metadata.distributions(name="inferlet")):  # else mypy has to find it
        environment["MYPYPATH"] = os.pathsep.join((str(ROOT), str(SDK)))
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("lang", ["python", "c"])
def test_it_launches_and_passes_its_own_tests(
    terminal: Terminal, tmp_path: Path, lang: str
) -> None:
    said = new(terminal, tmp_path, NAME, "--lang", lang).stdout.decode()
    folder = tmp_path / NAME
    assert {line.strip() for line in said.splitlines()} >= {
        f"cd {NAME}",
        "pytest" if lang == "python" else "make test",
    }
    for name in folder.iterdir():
        assert name.name in said
        assert "@NAME@" not in name.read_text()
    prompt = ["--prompt"] if lang == "python" else []
    if lang == "c":
        checked("make", "CFLAGS=-Werror", cwd=folder)
    done = terminal.run(
        *("launch", "--model", "scripted", folder, "--", *prompt, "The capital of France is"),
        check=0,
    )
    assert done.stdout == b" Paris.\n"
    tests = run_pytest(folder, terminal.environment, tmp_path / "site")
    assert tests.returncode == 0, tests.stdout + tests.stderr
    assert "4 passed" in tests.stdout


@pytest.fixture(scope="module")
def mypy_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What mypy knows of the standard library does not change from one folder to the next."""
    return tmp_path_factory.mktemp("mypy")


@pytest.mark.parametrize("lang", ["python", "c"])
def test_its_python_is_typed_and_tidy(
    terminal: Terminal, tmp_path: Path, mypy_cache: Path, lang: str
) -> None:
    new(terminal, tmp_path, NAME, "--lang", lang)
    folder = tmp_path / NAME
    cache = f"--cache-dir={mypy_cache}"
    checked(sys.executable, "-m", "mypy", "--strict", cache, ".", cwd=folder)
    ruff = Path(sys.executable).with_name("ruff")
    checked(ruff, "check", "--no-cache", ".", cwd=folder)
    checked(ruff, "format", "--check", "--no-cache", ".", cwd=folder)


def test_the_default_is_python(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    assert new(terminal, tmp_path, "deep/agent").returncode == 0
    assert (tmp_path / "deep/agent/main.py").exists()
    assert 'name = "agent"' in (tmp_path / "deep/agent/inferlet.toml").read_text()


def test_a_copy_of_the_binding_is_the_binding(terminal: Terminal, tmp_path: Path) -> None:
    new(terminal, tmp_path, "agent", "--lang", "c")
    for name in ("inferlet.h", "inferlet.c"):
        copied = tmp_path / "agent" / name
        assert copied.read_bytes() == (ROOT / "bindings" / "c" / name).read_bytes()
        assert not copied.is_symlink()


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_nothing_is_overwritten(terminal: Terminal, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "agent"
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to("nowhere")
    before = path.lstat()
    done = new(terminal, tmp_path, "agent")
    assert done.returncode == 125
    assert b"already" in done.stderr and b"try:" in done.stderr
    assert path.lstat() == before
    assert list(tmp_path.rglob("main.py")) == []


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a b", "2fast", "-x", "x" * 49, "\u00e9t\u00e9", "a\nb"]
)
def test_odd_names_are_wrong_usage(terminal: Terminal, tmp_path: Path, name: str) -> None:
    done = new(terminal, tmp_path, "--", name)
    assert done.returncode == 2
    assert b"cannot be the name" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_not_there(terminal: Terminal, tmp_path: Path) -> None:
    done = new(terminal, tmp_path, "nowhere/agent")
    assert done.returncode == 125
    assert b"cannot make the folder" in done.stderr and b"No such file" in done.stderr
