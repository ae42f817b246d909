"""The hostile suite's fast part, and that its lists of attacks and sabotages are whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .hostile import calls, exhaustion, protocol
from .hostile.__main__ import QUICK_PROFILES
from .hostile.cases import PROFILES
from .mutants.sabotages import HOSTILE, SABOTAGES
from .plain_user import USERS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("user", USERS)
def test_attacks_on_a_real_server_harm_nobody(user: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile", "--quick", "--json", "--user", user],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr
    rows = json.loads(done.stdout)
    wrong = [f"{row['attack']} ({row['profile']}): {row['got']}" for row in rows if not row["good"]]
    assert not wrong, "\n".join(wrong)
    assert done.returncode == 0 and len(rows) > 70
    assert {row["profile"] for row in rows} == set(QUICK_PROFILES)
    assert {row["promise"] for row in rows} == {f"P{number}" for number in range(1, 8)}
    assert {row["user"] for row in rows} == {user}


def test_every_attack_says_what_it_tests() -> None:
    cases = [*exhaustion.CASES, *protocol.CASES]
    names = [case.name for case in cases]
    assert sorted(set(names)) == sorted(names)
    promises = {f"P{number}" for number in range(1, 11)}
    assert {case.promise for case in cases} | set(calls.BY_PROMISE) <= promises
    for case in cases:
        assert {*case.not_on, *case.on_profile} <= set(PROFILES)
        assert all(case.not_on.values()), "an attack is left out without a reason"


def test_every_sabotage_still_fits() -> None:
    """Exactly one place is sabotaged, and the test that must notice exists."""
    assert len(SABOTAGES) >= 30
    for sabotage in SABOTAGES:
        assert (ROOT / sabotage.file).read_text().count(sabotage.old) == 1, sabotage
        assert sabotage.old != sabotage.new
        if sabotage.test.startswith(HOSTILE):
            attack = sabotage.test.removeprefix(HOSTILE)
            assert any(attack in case.name for case in [*exhaustion.CASES, *protocol.CASES])
            continue
        file, _, name = sabotage.test.partition("::")
        assert not name or f"def {name}(" in (ROOT / file).read_text(), sabotage
