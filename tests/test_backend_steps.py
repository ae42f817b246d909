"""What a step message does to the pool and to what comes after: one small model, in-process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from piehost.gpu_backend.backend import Backend
from piehost.wire.step import LATE_STEPS, MAX_SAMPLES, Step

from . import fake_flashinfer
from .backend_steps import PAGE, clear_all, listed, ok, prompt, row
from .checkpoints import VOCAB_SIZE, make_checkpoint
from .scripted_backend import samples
from .step_driver import StepDriver, i32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), seed=6)


@pytest.fixture(scope="module")
def backend(folder: Path) -> Backend:
    return Backend(str(folder), dtype="float32", kv_pages=64)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-4)


def test_a_late_token_is_the_one_sampled_before(backend: Backend) -> None:
    clear_all(backend)
    tokens = prompt(9)
    first = LATE_STEPS + 1  # its place in the buffer wraps around
    step = listed(first, tokens, list(range(9)), list(range(9)), row=1, **samples([1, 1]))
    sampled = np.frombuffer(ok(backend.run(step)).tokens, np.int32)
    assert sampled[0] == sampled[1]
    late = first % LATE_STEPS * MAX_SAMPLES + 1
    reads = list(range(9))
    ok(backend.run(listed(first + 1, [~late, 5], [9, 10], [9, 10], reads, row=2)))
    by_late = row(backend, 2)
    ok(backend.run(listed(first + 2, [int(sampled[0]), 5], [9, 10], [9, 10], reads, row=3)))
    assert torch.equal(by_late, row(backend, 3))
    ok(backend.run(listed(first + 3, [int(sampled[0]) + 1, 5], [9, 10], [9, 10], reads, row=4)))
    assert not same(by_late, row(backend, 4))


def test_copied_slots_answer_as_the_originals(backend: Backend) -> None:
    clear_all(backend)
    source, target = list(range(8)), [200, 107, 33, 64, 65, 66, 90, 18]
    ok(backend.run(listed(0, prompt(8), list(range(8)), source)))
    ok(backend.run(listed(1, [7], [8], [300], source, row=1)))
    copy = {"copy_source": i32(source), "copy_target": i32(target)}
    ok(backend.run(listed(2, [7], [8], [301], target, row=2, **copy)))
    assert same(row(backend, 1), row(backend, 2))
    # unwritten slots are copied as unwritten
    ok(backend.run(Step(3, copy_source=i32([400]), copy_target=i32([target[3]]))))
    ok(backend.run(listed(4, [7], [8], [301], target, row=2)))
    kept = [slot for i, slot in enumerate(source) if i != 3]
    ok(backend.run(listed(5, [7], [8], [300], kept, row=1)))
    assert same(row(backend, 1), row(backend, 2))


def test_hidden_cleared_and_shown_slots(backend: Backend) -> None:
    clear_all(backend)
    slots = list(range(16, 48))
    tokens = prompt(32)
    ok(backend.run(listed(0, tokens, list(range(32)), slots)))

    def asked(number: int, reads: list[int], **more: bytes) -> torch.Tensor:
        ok(backend.run(listed(number, [7], [32], [500], reads, row=1, **more)))
        return row(backend, 1)

    whole = asked(1, slots)
    without = asked(2, [s for s in slots if s not in (20, 40)])
    assert not same(whole, without)
    assert same(asked(3, slots, hide=i32([20, 40])), without)
    assert same(asked(4, slots, show=i32([20, 40])), whole)
    assert same(asked(5, slots, clear_slots=i32([20, 40])), without)
    assert same(asked(6, slots, show=i32([20, 40])), without)  # showing is not writing
    assert same(asked(7, slots, clear_pages=i32([1])), asked(8, slots[16:32]))


def test_writing_a_hidden_slot_shows_it(backend: Backend) -> None:
    clear_all(backend)
    ok(backend.run(listed(0, [5], [0], [3])))
    ok(backend.run(listed(1, [9], [1], [4], [3], row=1)))
    ok(backend.run(listed(2, [5], [0], [3], hide=i32([3]))))
    ok(backend.run(listed(3, [9], [1], [4], [3], row=2)))
    assert same(row(backend, 1), row(backend, 2))


def test_inputs_in_scratch_slots_attend_to_each_other(backend: Backend) -> None:
    clear_all(backend)
    scratch = backend.pool.pages * PAGE
    tokens = prompt(6)
    ok(backend.run(listed(0, tokens, list(range(6)), list(range(6)), row=1)))
    ok(backend.run(listed(1, tokens, list(range(6)), [scratch + 511 - i for i in range(6)], row=2)))
    assert same(row(backend, 1), row(backend, 2))


@pytest.mark.parametrize(
    "broken",
    [
        {"write_slots": i32([1 << 20])},
        {"keep_rows": i32([1 << 20])},
        {"tokens": i32([VOCAB_SIZE])},
        {"listed_slots": i32([0, 1 << 20])},
        {"listed_masks": [b"\x00\x00\x00"]},
        {"positions": b""},
        {"copy_source": i32([1 << 20]), "copy_target": i32([0])},
    ],
    ids=lambda broken: next(iter(broken)),
)
def test_a_failing_step_says_so_counts_for_nothing_and_the_next_one_works(
    backend: Backend, broken: dict[str, Any]
) -> None:
    clear_all(backend)
    ok(backend.run(listed(0, [5], [0], [0])))
    ok(backend.run(listed(1, [9], [1], [2], [0], row=1)))
    bad = listed(2, [6], [1], [1], [0], row=3)
    for name, value in broken.items():
        setattr(bad, name, value)
    done = backend.run(bad)
    assert done.error is not None
    assert done.tokens == b""
    assert "Traceback" not in done.error
    ok(backend.run(listed(3, [9], [1], [2], [0, 1], row=2)))  # slot 1 was not written
    assert same(row(backend, 1), row(backend, 2))


@pytest.mark.parametrize("page_size", [8, 32])
def test_the_page_size_changes_nothing(folder: Path, backend: Backend, page_size: int) -> None:
    other = Backend(str(folder), dtype="float32", kv_pages=1024 // page_size, page_size=page_size)
    outputs = []
    for made in (backend, other):
        driver = StepDriver(made.run, made.pool.page_size, chunk=10)
        sequences = [driver.add(prompt(n, n), 12) for n in (5, 31, 32, 50)]
        driver.generate(sequences, 12)
        outputs.append([s.output for s in sequences])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("architecture", ["gemma2", "llama"])
def test_a_model_gives_the_same_with_the_flashinfer_engine(
    tmp_path: Path, architecture: str
) -> None:
    backend = Backend(
        str(make_checkpoint(tmp_path, architecture, seed=4)), dtype="float32", kv_pages=64
    )

    def outputs() -> list[list[int]]:
        driver = StepDriver(backend.run, PAGE, chunk=13)
        sequences = [driver.add(prompt(n, n), 10) for n in (1, 16, 40)]
        driver.generate(sequences, 10)
        return [s.output for s in sequences]

    expected = outputs()
    with fake_flashinfer.installed():
        from piehost.gpu_backend.flashinfer_engine import FlashInferEngine

        backend.engine = FlashInferEngine(backend.pool)
        assert outputs() == expected


def test_the_pool_takes_no_more_than_its_share_of_memory(folder: Path) -> None:
    small = Backend(str(folder), dtype="float32", kv_memory=1e-4)
    large = Backend(str(folder), dtype="float32", kv_memory=2e-4)
    assert 1.5 < large.pool.pages / small.pool.pages < 2.5
