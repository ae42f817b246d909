"""`python -m tests.mutants [TEXT]`: sabotages a copy of the tree, and runs the tests.

Each of `SABOTAGES` whose file or replaced text holds TEXT, by itself; a test must notice. Exit
code 1 if one is missed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from ..plain_user import USERS
from .sabotages import HOSTILE, SABOTAGES, Sabotage

ROOT: Final = Path(__file__).parents[2]
_LEFT_OUT: Final = (".git", ".venv", "__pycache__", "results", ".*_cache", "shared")
_SECONDS: Final = 300.0
_FAILED: Final = 1  # of pytest: tests ran, and some failed


def run(tree: Path, *tests: str) -> int | None:
    """pytest's exit code; None if it hangs, which is noticed too."""
    paths = f"{tree}:{tree / 'bindings' / 'python'}"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    if tests[0].startswith(HOSTILE):
        attack = tests[0].removeprefix(HOSTILE)
        command = [sys.executable, "-m", "tests.hostile", "--profile", "native"]
        command += ["--user", USERS[0], "--attack", attack]
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.DEVNULL,  # no pipe, which whatever is left of a test would hold open
            stderr=subprocess.DEVNULL,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def verdict(tree: Path, sabotage: Sabotage) -> str:
    path = tree / sabotage.file
    source = path.read_text()
    if source.count(sabotage.old) != 1:
        return "NOT THERE"
    path.write_text(source.replace(sabotage.old, sabotage.new))
    try:
        code = run(tree, sabotage.test)
    finally:
        path.write_text(source)
    if code is None:
        return "caught (hangs)"
    return {_FAILED: "caught", 0: "SURVIVED"}.get(code, f"DID NOT RUN ({code})")


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [s for s in SABOTAGES if wanted in s.file or wanted in s.old]
    missed = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        tree = Path(directory) / "tree"
        ignore = shutil.ignore_patterns(*_LEFT_OUT)
        shutil.copytree(ROOT, tree, symlinks=True, ignore=ignore)
        tree.parent.chmod(0o755)
        tests = {sabotage.test for sabotage in chosen}
        together = sorted(test for test in tests if not test.startswith(HOSTILE))
        alone = [(test,) for test in sorted(tests - set(together))]
        for group in [tuple(together)] * bool(together) + alone:
            if run(tree, *group) != 0:
                print(f"fails without any sabotage: {' '.join(group)}")
                return 1
        for sabotage in chosen:
            got = verdict(tree, sabotage)
            missed += not got.startswith("caught")
            old = " ".join(sabotage.old.split())
            print(f"{sabotage.file:38} {old[:58]:58} {sabotage.test[-50:]:50} {got}", flush=True)
    print(f"{len(chosen)} sabotages, {missed} not caught")
    return int(missed > 0 or not chosen)


if __name__ == "__main__":
    sys.exit(main())
