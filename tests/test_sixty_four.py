"""The main claim: many inferlets at once, in two languages, share steps and stay apart."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from piehost.host.client import Client, Run
from piehost.wire import client as wire

pytestmark = pytest.mark.alone

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = Path(__file__).resolve().parent / "programs"
TOKENS = 48
PROMPTS = [
    "The capital of France is",
    "Q: 47 + 38 = ?",
    "List three fruits:\n1.",
    "Question: What is the capital of Japan?\nThought:",
    '{"name":',
    ">>> len('abc')\n",
    "Hello! " * 12,
    "A",
]


@pytest.fixture(scope="module")
def chorus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The Python program and its C twin."""
    binary = tmp_path_factory.mktemp("chorus") / "chorus"
    binding = ROOT / "bindings" / "c"
    subprocess.run(
        [
            *("cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-O2", "-static", "-I", binding),
            *("-o", binary, PROGRAMS / "chorus.c", binding / "inferlet.c"),
        ],
        check=True,
    )
    return [PROGRAMS / "chorus.py", binary]


def start(client: Client, program: Path, prompt: str) -> Run:
    return client.launch(program, ["--prompt", prompt, "--max-tokens", str(TOKENS)])


def wait_ready(run: Run) -> None:
    for event in run.events():
        if isinstance(event, wire.Message):
            assert event.data == b"ready"
            return
        assert not isinstance(event, wire.Ended), event.reason


def test_sixty_four_at_once_equal_their_solo_runs(client: Client, chorus: list[Path]) -> None:
    solo: dict[tuple[Path, str], str] = {}
    for program in chorus:
        for prompt in PROMPTS:
            run = start(client, program, prompt)
            wait_ready(run)
            run.send(b"go")
            result = run.result(timeout=120)
            assert result.code == 0, result.stderr
            assert result.stats.tokens_out == TOKENS
            solo[program, prompt] = result.text
    for prompt in PROMPTS:
        assert solo[chorus[0], prompt] == solo[chorus[1], prompt], "C and Python agree"
    assert len(set(solo.values())) == len(PROMPTS), "the prompts lead to different texts"

    cases = [(chorus[i % 2], PROMPTS[i // 2 % len(PROMPTS)]) for i in range(64)]
    runs = [start(client, program, prompt) for program, prompt in cases]
    for run in runs:
        wait_ready(run)
    before = client.stats().controller
    for run in runs:
        run.send(b"go")
    results = [run.result(timeout=240) for run in runs]
    after = client.stats().controller
    for (program, prompt), result in zip(cases, results, strict=True):
        assert result.code == 0, result.stderr
        assert result.text == solo[program, prompt]
    segments = after.decode_segments - before.decode_segments
    steps = after.decode_steps - before.decode_steps
    assert segments / steps >= 40
    assert after.pages_free == after.pages_total


def test_generation_needs_few_messages(client: Client, chorus: list[Path]) -> None:
    """Frames both ways for a generation alone, those that carry its text included."""
    for program in chorus:
        run = start(client, program, PROMPTS[0])
        wait_ready(run)
        run.send(b"go")
        stats = run.result(timeout=120).stats
        handshake = 6  # ready, go, tokenize and their like
        assert (stats.frames_in + stats.frames_out - handshake) / stats.tokens_out <= 0.3
