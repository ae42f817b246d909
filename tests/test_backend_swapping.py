"""Pages that go to host memory and come back to other pages: nothing that a step gives changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from piehost.gpu_backend.backend import Backend
from piehost.gpu_backend.errors import LoadError
from piehost.gpu_backend.scripted import ScriptedBackend
from piehost.wire.step import Step, StepDone

from .backend_steps import PAGE, clear_all, listed, ok, prompt, row
from .checkpoints import make_checkpoint
from .step_driver import StepDriver, i32

PAGES, PLACES = 32, 40


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backend:
    folder = make_checkpoint(tmp_path_factory.mktemp("model"), request.param, seed=6)
    return Backend(str(folder), dtype="float32", kv_pages=PAGES, swap_pages=PLACES)


def out(pages: list[int], places: list[int]) -> Step:
    return Step(90, swap_out_pages=i32(pages), swap_out_places=i32(places))


def back(places: list[int], pages: list[int]) -> Step:
    return Step(91, swap_in_places=i32(places), swap_in_pages=i32(pages))


def content(backend: Backend, pages: list[int]) -> list[torch.Tensor]:
    pool = backend.pool
    kept = [kv[:, pages] for kv in pool.kv]
    return [*kept, pool.positions[pages], pool.visibility[pages]]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_bit_of_a_page_comes_back_wherever_it_comes_to(backend: Backend) -> None:
    clear_all(backend)
    slots = list(range(2 * PAGE, 5 * PAGE - 3))
    ok(backend.run(listed(0, prompt(len(slots)), list(range(len(slots))), slots)))
    ok(backend.run(Step(1, hide=i32([35, 60]), clear_slots=i32([40]))))
    before = content(backend, [2, 3, 4])
    ok(backend.run(out([2, 3, 4], [39, 0, 7])))
    other = [PAGE * page + i for page in (2, 3, 4) for i in range(PAGE)]
    ok(backend.run(listed(2, prompt(48, 1), list(range(48)), other)))
    assert not same(before, content(backend, [2, 3, 4]))
    ok(backend.run(back([39, 0, 7], [9, 4, 31])))
    assert same(before, content(backend, [9, 4, 31]))


def test_swaps_come_after_clearing_and_before_all_else(backend: Backend) -> None:
    """What was freed and taken again in the same step is not what was cleared."""
    clear_all(backend)
    ok(backend.run(listed(0, prompt(32), list(range(32)), list(range(32)))))
    ok(backend.run(listed(1, [7], [32], [300], list(range(32)), row=1)))
    ok(backend.run(out([0, 1], [3, 4])))
    step = listed(2, [7], [32], [300], list(range(160, 192)), row=2)
    step.clear_pages, step.clear_slots = i32([10, 11, 5]), i32([161])
    step.swap_in_places, step.swap_in_pages = i32([3, 4]), i32([10, 11])
    step.swap_out_pages, step.swap_out_places = i32([5]), i32([5])
    ok(backend.run(step))
    assert torch.equal(row(backend, 1), row(backend, 2))
    ok(backend.run(back([5], [6])))
    assert not (backend.pool.positions[6] >= 0).any(), "it went out cleared"


def test_a_generation_goes_on_as_if_it_had_never_been_away(backend: Backend) -> None:
    outputs = []
    for swapping in (False, True):
        clear_all(backend)
        driver = StepDriver(backend.run, PAGE, chunk=17)
        sequences = [driver.add(prompt(n, n), 24) for n in (5, 16, 40)]
        random = np.random.default_rng(3)
        while any(len(s.output) < 24 for s in sequences):
            if swapping:  # all pages change their places, one sequence after the other
                for s in sequences:
                    places = random.permutation(PLACES)[: len(s.pages)].tolist()
                    ok(backend.run(out(s.pages, places)))
                    taken = {p for o in sequences if o is not s for p in o.pages}
                    free = [p for p in range(PAGES) if p not in taken]
                    s.pages = random.permutation(free)[: len(s.pages)].tolist()
                    ok(backend.run(back(places, s.pages)))
            driver.step([s for s in sequences if len(s.output) < 24])
        outputs.append([s.output for s in sequences])
    assert outputs[0] == outputs[1]


def test_a_step_that_fails_keeps_its_swaps(backend: Backend) -> None:
    clear_all(backend)
    ok(backend.run(listed(0, prompt(16), list(range(16)), list(range(16)))))
    before = content(backend, [0])
    step = out([0], [1])
    step.copy_source, step.copy_target = i32([1 << 20]), i32([0])
    assert backend.run(step).error is not None
    ok(backend.run(back([1], [20])))
    assert same(before, content(backend, [20]))


def test_a_swap_that_fails_is_no_failed_step(backend: Backend) -> None:
    """What it was to move is lost: a server that went on would give wrong answers."""
    with pytest.raises(IndexError):
        backend.run(out([0], [PLACES]))


def test_the_scripted_model_swaps_as_any_other() -> None:
    backend = ScriptedBackend("scripted", kv_pages=PAGES, swap_pages=4)
    vectors = []
    for swapped in (False, True):
        ok(backend.run(Step(0, clear_pages=i32(range(PAGES)))))
        ok(backend.run(listed(1, prompt(20), list(range(20)), list(range(20)))))
        ok(backend.run(Step(2, hide=i32([3]))))
        reads = list(range(20))
        if swapped:
            ok(backend.run(out([0, 1], [3, 0])))
            ok(backend.run(Step(3, clear_pages=i32([0, 1]))))
            ok(backend.run(back([3, 0], [8, 2])))
            reads = [*range(128, 144), *range(32, 36)]
        done: StepDone = ok(backend.run(listed(4, [7], [20], [300], reads, row=1)))
        assert done.error is None
        vectors.append(backend._vectors[1].copy())
    assert np.array_equal(*vectors)


def test_how_many_places_there_are(tmp_path: Path) -> None:
    folder = str(make_checkpoint(tmp_path))
    assert Backend(folder, kv_pages=16).swap.pages == 16, "as many as pages"
    assert Backend(folder, kv_pages=16, swap_pages=0).swap.pages == 0
    large = Backend(folder, kv_memory=0.01)
    assert 0 < large.swap.pages <= large.pool.pages
    with pytest.raises(LoadError, match="swap"):
        Backend(folder, kv_pages=16, swap_pages=1 << 40)
