"""What a program prints when its function raises: its own frames, not those that called it."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from scripted import run_program

BODIES = {
    "plain": "def main(model: Model):\n    helper()",
    "generator": "def main(model: Model):\n    yield 'x'\n    helper()",
    "async": "async def main(model: Model):\n    await asyncio.sleep(0)\n    helper()",
    "async generator": "async def main(model: Model):\n    yield 'x'\n    helper()",
    "async and generator": "async def main(model: Model):\n  return (helper() for _ in 'x')",
}


def frames(tmp_path: Path, body: str, helper: str, *args: str) -> tuple[int, list[str], str]:
    """(status, "file:function" of each frame printed, the last line) of a program."""
    script = tmp_path / "script.py"
    head = "import asyncio, sys\nfrom inferlet import *\n"
    script.write_text(f"{head}def helper():\n    {helper}\n\n@inferlet\n{body}\n")
    outcome = run_program(script, args, tmp_path=tmp_path)
    lines = outcome.stderr.splitlines()
    shown = [line.split('"')[1:] for line in lines if line.startswith("  File ")]
    return (
        outcome.status,
        [f"{Path(file).name}:{rest.split(' in ')[1]}" for file, rest in shown],
        lines[-1],
    )


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_it_begins_with_the_function(tmp_path: Path, body: str) -> None:
    status, shown, last = frames(tmp_path, body, "return 1 / 0")
    assert status == 1 and last == "ZeroDivisionError: division by zero"
    assert shown[-1] == "script.py:helper" and shown[0] in ("script.py:main", "script.py:<genexpr>")
    assert len(shown) == 2


def test_frames_of_the_sdk_below_it_stay(tmp_path: Path) -> None:
    body = BODIES["plain"]
    status, shown, last = frames(tmp_path, body, "list(available_models()[0].detokenize(5))")
    assert status == 1 and last.startswith("TypeError")
    assert shown[:2] == ["script.py:main", "script.py:helper"]
    assert len(shown) > 2 and not any(frame.startswith("script.py") for frame in shown[2:])


def test_an_inferlet_error_with_debug(tmp_path: Path) -> None:
    status, shown, last = frames(tmp_path, BODIES["plain"], "get_arg(7)", "--debug")
    assert status == 1 and "argument 7 was asked for" in last
    assert shown[:2] == ["script.py:main", "script.py:helper"]


def test_what_the_program_cannot_be_told_as_keeps_its_frames(tmp_path: Path) -> None:
    """Where there is no frame of the program's own, all are shown."""
    status, shown, last = frames(tmp_path, "def main():\n    return '\\ud800'", "pass")
    assert status == 1 and last.startswith("UnicodeEncodeError")
    assert shown and shown[-1].startswith("program.py:")


def test_a_hook_of_the_program_s_own_is_asked(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from inferlet import *

            def hook(kind, error, trace):
                send(f"{kind.__name__} in {trace.tb_frame.f_code.co_name}")

            sys.excepthook = hook

            @inferlet
            def main():
                1 / 0
            """
        )
    )
    outcome = run_program(script, tmp_path=tmp_path)
    assert (outcome.status, outcome.stderr) == (1, "")
    assert outcome.text == "ZeroDivisionError in main"
