"""The program in its sandbox, on a model that says what the test tells it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from inferlet.testing import Piehost


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    subprocess.run(["make"], cwd=Path(__file__).parent, check=True)


def test_it_continues_the_prompt(piehost: Piehost) -> None:
    piehost.says("Once upon a time", " there was a page.")
    run = piehost.launch(".", "Once upon a time")
    assert run.text == " there was a page."
    assert run.exit_code == 0


def test_it_stops_at_max_tokens(piehost: Piehost) -> None:
    piehost.says("Count:", " 1 2 3 4 5 6")
    run = piehost.launch(".", "Count:", "2")
    assert " 1 2 3 4 5 6".startswith(run.text)
    assert run.stats is not None and run.stats.tokens_out == 2


def test_it_needs_a_prompt(piehost: Piehost) -> None:
    run = piehost.launch(".")
    assert run.exit_code == 2
    assert "usage:" in run.stderr


def test_the_embedded_model_knows_capitals(piehost: Piehost) -> None:
    piehost.use_model("default")
    run = piehost.launch(".", "The capital of France is", "8")
    assert run.text.startswith(" Paris")
