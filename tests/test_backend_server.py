"""The backend as a process, over real socketpairs, with real rings."""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from inferlet.abi import read_vocab_table
from tokenizers import Tokenizer

from piehost.wire.step import DropRing, LoadFailed, Ready, Step

from .backend_process import BackendProcess
from .checkpoints import VOCAB_SIZE, byte_level_tokenizer, make_checkpoint
from .step_driver import StepDriver, i32

RING = 16 * mmap.PAGESIZE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), seed=6)


@pytest.fixture(scope="module")
def started(folder: Path) -> Iterator[tuple[BackendProcess, Ready, list[int]]]:
    backend = BackendProcess(str(folder), "--kv-pages", "64", "--page-size", "8")
    ready, fds = backend.started()
    assert isinstance(ready, Ready)
    yield backend, ready, fds
    backend.close()


@pytest.fixture
def backend(started: tuple[BackendProcess, Ready, list[int]]) -> BackendProcess:
    return started[0]


def prefill(step: int = 0, **more: object) -> Step:
    """Five tokens in page 0, the last one's hidden state in row 3."""
    return Step(
        step,
        clear_pages=i32([0]),
        tokens=i32([5, 6, 7, 8, 9]),
        positions=i32(range(5)),
        write_slots=i32(range(5)),
        paged_inputs=i32([5]),
        paged_kv=i32([5]),
        paged_pages=i32([0]),
        keep_inputs=i32([4]),
        keep_rows=i32([3]),
        **more,  # type: ignore[arg-type]
    )


def entries(fd: int, offset: int, k: int) -> tuple[list[int], list[float]]:
    data = os.pread(fd, 8 * k, offset)
    ids, chances = np.frombuffer(data[: 4 * k], "<u4"), np.frombuffer(data[4 * k :], "<f4")
    return ids.tolist(), chances.tolist()


def test_ready_tells_what_was_loaded(
    started: tuple[BackendProcess, Ready, list[int]], folder: Path
) -> None:
    backend, ready, fds = started
    assert (ready.pages, ready.scratch_slots, ready.device, ready.engine) == (
        64,
        512,
        "cpu",
        "torch",
    )
    model = ready.model
    assert model.name == folder.name
    assert model.architecture == "LlamaForCausalLM"
    assert (model.page_size, model.vocab_size, model.max_context) == (8, VOCAB_SIZE, 512)
    assert (model.bos_token, model.eos_tokens) == (0, [1])
    outputs = ["OutputText", "OutputEmbed", "InputEmbed"]
    assert model.traits == ["Allocate", "Forward", "InputText", "Tokenize", *outputs]
    fractions = [progress.fraction for progress in backend.progress]
    assert len(fractions) > 3
    assert fractions == sorted(fractions)

    table, tokenizer = (os.pread(fd, os.fstat(fd).st_size, 0) for fd in fds)
    for fd in fds:
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
    pieces, special = read_vocab_table(table)
    assert len(pieces) == VOCAB_SIZE
    text = "The capital of Fran\u00e7a is 42\U0001f600"
    ids = Tokenizer.from_str(tokenizer.decode()).encode(text).ids
    assert ids == byte_level_tokenizer().encode(text)
    assert b"".join(pieces[i] for i in ids).decode() == text
    assert special[:3] == [True] * 3
    assert not any(special[3:300])


def test_steps_are_answered_in_order(backend: BackendProcess) -> None:
    done = backend.run(*[prefill(step) for step in range(8)])
    assert [answer.step for answer in done] == list(range(8))
    assert all(answer.error is None and answer.seconds > 0 for answer in done)


def test_generation_over_the_link(backend: BackendProcess) -> None:
    outputs = []
    for _ in range(2):
        driver = StepDriver(lambda step: backend.run(step)[0], 8)
        sequence = driver.add([5, 6, 7], 20)
        driver.generate([sequence], 20)
        outputs.append(sequence.output)
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) > 5


def test_distributions_go_into_the_rings(backend: BackendProcess) -> None:
    first, second = backend.add_ring(1, RING), backend.add_ring(2, RING)
    whole = VOCAB_SIZE
    dists = [(3, 4, 1, 0), (3, 4, 2, 64), (3, 10_000, 1, 128)]
    (done,) = backend.run(prefill(dists=dists))
    assert done.dists == [4, 4, whole]
    ids, chances = entries(first, 0, 4)
    assert entries(second, 64, 4) == (ids, chances)
    all_ids, all_chances = entries(first, 128, whole)
    assert all_ids[:4] == ids
    assert sorted(all_ids) == list(range(whole))
    assert all_chances == sorted(all_chances, reverse=True)
    assert sum(all_chances) == pytest.approx(1, abs=1e-5)
    assert os.pread(second, 64, 0) == bytes(64)  # nothing beside what was asked for
    greedy = {
        "sample_rows": i32([3]),
        "temperature": np.zeros(1, np.float32).tobytes(),
        "top_k": i32([0]),
        "top_p": np.ones(1, np.float32).tobytes(),
        "min_p": np.zeros(1, np.float32).tobytes(),
        "uniform": np.zeros(1, np.float64).tobytes(),
    }
    (done,) = backend.run(prefill(**greedy))
    assert np.frombuffer(done.tokens, np.int32).tolist() == ids[:1]


def test_the_other_side_of_a_ring_can_only_read(backend: BackendProcess) -> None:
    fd = backend.add_ring(5, RING)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, RING, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    view = mmap.mmap(fd, RING, mmap.MAP_SHARED, mmap.PROT_READ)
    before = view[:32]
    (done,) = backend.run(prefill(dists=[(3, 4, 5, 0)]))
    assert done.dists == [4]
    assert view[:32] != before  # the backend still writes


def test_unknown_rings_and_ranges_outside_give_minus_one(backend: BackendProcess) -> None:
    fd = backend.add_ring(7, RING)
    dists = [(3, 4, 99, 0), (3, 4, 7, RING - 28), (3, 4, 7, RING - 32), (3, 4, 7, 0)]
    (done,) = backend.run(prefill(dists=dists))
    assert done.dists == [-1, -1, 4, 4]
    assert os.pread(fd, 4, RING - 4) != bytes(4)
    backend.host.send(DropRing(7))
    backend.add_ring(8, RING)  # answered after the drop
    (done,) = backend.run(prefill(dists=dists))
    assert done.dists == [-1] * 4


def test_a_failing_step_is_reported_and_the_server_goes_on(backend: BackendProcess) -> None:
    bad = prefill(1)
    bad.write_slots = i32([1 << 24] * 5)
    answers = backend.run(prefill(0), bad, prefill(2))
    assert [a.step for a in answers] == [0, 1, 2]
    assert [a.error is None for a in answers] == [True, False, True]


def test_interrupts_are_left_to_the_host(backend: BackendProcess) -> None:
    backend.process.send_signal(signal.SIGINT)
    (done,) = backend.run(prefill())
    assert done.error is None


@pytest.mark.parametrize("link", ["host", "controller"])
def test_the_end_of_either_link_ends_the_backend(folder: Path, link: str) -> None:
    backend = BackendProcess(str(folder), "--kv-pages", "8")
    ready, _ = backend.started()
    assert isinstance(ready, Ready)
    getattr(backend, link).close()
    assert backend.process.wait(30) == 0
    assert b"Traceback" not in backend.process.communicate()[1]
    backend.close()


def test_a_model_that_cannot_be_served_is_an_answer_not_a_traceback(tmp_path: Path) -> None:
    backend = BackendProcess(str(tmp_path / "nowhere"))
    failed, _ = backend.started()
    assert isinstance(failed, LoadFailed)
    assert "nowhere" in failed.message
    assert failed.hint
    assert backend.process.wait(30) == 1
    assert b"Traceback" not in backend.process.communicate()[1]
    backend.close()
