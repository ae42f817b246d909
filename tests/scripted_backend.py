"""Scripted backends that run in the test's own process: their scripts, their rings, their steps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from piehost.gpu_backend.scripted import ScriptedBackend
from piehost.host.shm import create_ring, create_ring_in
from piehost.wire.step import Step

from .step_driver import StepDriver, i32

FOLDER = Path(__file__).resolve().parent.parent / "gpu_backend" / "default_model"
TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
VOCAB = 2048
PAGE = 8
TWO = """
[[say]]
after = "Q: name?\\nA:"
text = " My name is Pie."

[[say]]
after = "A:"
text = " Yes."
"""


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text).ids
    return ids


def backend_of(tmp_path: Path, script: str) -> ScriptedBackend:
    path = tmp_path / "script.toml"
    path.write_text(script)
    return ScriptedBackend(f"scripted:{path}", page_size=PAGE, kv_pages=64)


@pytest.fixture
def unscripted(tmp_path: Path) -> ScriptedBackend:
    """The checksum alone decides."""
    return backend_of(tmp_path, "")


def said(backend: ScriptedBackend, prompt: list[int], most: int = 40) -> list[int]:
    """What the model says greedily, up to an end token (left out) or `most` tokens."""
    driver = StepDriver(backend.run, backend.info.page_size)
    sequence = driver.add(prompt, most)
    while len(sequence.output) < most:
        driver.step([sequence])
        if sequence.output[-1] in backend.info.eos_tokens:
            return sequence.output[:-1]
    return sequence.output


class Rings:
    """A pair of rings of `backend`, and what one can see through them."""

    def __init__(self, backend: ScriptedBackend, number: int = 1) -> None:
        self.backend, self.number = backend, number
        self.out, self.into = create_ring("out", 1 << 20), create_ring_in("in", 1 << 16)
        backend.add_ring(number, self.out, 1 << 20, self.into, 1 << 16)

    def distribution(self, offset: int, k: int) -> tuple[list[int], list[float]]:
        data = os.pread(self.out, 8 * k, offset)
        return (
            np.frombuffer(data[: 4 * k], "<u4").tolist(),
            np.frombuffer(data[4 * k :], "<f4").tolist(),
        )

    def read(self, number: int, row: int, k: int = 50) -> tuple[list[int], list[float]]:
        """The distribution after hidden state `row`, by step `number`."""
        done = self.backend.run(Step(number, dists=[(row, k, self.number, 0)]))
        assert (done.error, done.dists) == (None, [k])
        return self.distribution(0, k)

    def close(self) -> None:
        os.close(self.out)
        os.close(self.into)


@pytest.fixture
def rings(unscripted: ScriptedBackend) -> Iterator[Rings]:
    made = Rings(unscripted)
    yield made
    made.close()


def samples(rows: list[int], **more: Any) -> dict[str, Any]:
    """The fields of greedy samples from these rows, changed by `more`."""
    count = len(rows)
    return {
        "sample_rows": i32(rows),
        "temperature": np.zeros(count, np.float32).tobytes(),
        "top_k": i32([0] * count),
        "top_p": np.ones(count, np.float32).tobytes(),
        "min_p": np.zeros(count, np.float32).tobytes(),
        "uniform": np.zeros(count, np.float64).tobytes(),
    } | more


def prefill(step: int, tokens: list[int], page: int = 0, row: int = 3, **more: Any) -> Step:
    """`tokens` at positions 0, 1, ... of one page; the last one's hidden state goes to `row`."""
    count = len(tokens)
    return Step(
        step,
        clear_pages=i32([page]),
        tokens=i32(tokens),
        positions=i32(range(count)),
        write_slots=i32(range(page * PAGE, page * PAGE + count)),
        paged_inputs=i32([count]),
        paged_kv=i32([count]),
        paged_pages=i32([page]),
        keep_inputs=i32([count - 1]),
        keep_rows=i32([row]),
        **more,
    )
