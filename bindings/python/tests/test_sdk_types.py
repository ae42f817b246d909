"""The package is typed: user code checks strictly, and wrong user code does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_user_code_is_clean_under_strict_mypy(tmp_path: Path) -> None:
    # a program that is run as its own, not as a part of this project: its settings stay out
    settings = tmp_path / "mypy.ini"
    settings.write_text("[mypy]\nstrict = True\nwarn_unused_ignores = True\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--config-file", str(settings)),
            *("--cache-dir", str(tmp_path / "cache"), str(TESTS / "typed_program.py")),
        ],
        capture_output=True,
        text=True,
        env={"MYPYPATH": str(TESTS.parent), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_says_that_it_is_typed() -> None:
    assert (TESTS.parent / "inferlet" / "py.typed").is_file()
