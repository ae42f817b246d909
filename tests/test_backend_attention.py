"""Both attention engines against a dense reference that goes slot by slot, as `docs/abi.md` says.

FlashInfer's kernels are replaced by a naive stand-in: what is tested is what we ask of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from piehost.gpu_backend.batch import AttentionBatch
from piehost.gpu_backend.engine import AttentionEngine
from piehost.gpu_backend.kv_pool import KvPool, LayerShape
from piehost.gpu_backend.torch_engine import TorchEngine
from piehost.wire.step import Step

from . import fake_flashinfer
from .step_driver import i32

HEADS, KV_HEADS, DIM = 4, 2, 8
PAGES, PAGE = 24, 8


def make_pool() -> KvPool:
    shape = LayerShape(HEADS, KV_HEADS, DIM)
    pool = KvPool(
        [shape],
        pages=PAGES,
        page_size=PAGE,
        rows=4,
        hidden_size=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    # what another sequence left behind must not matter, whatever it is
    pool.kv[0][:, :PAGES] = float("nan")
    return pool


@pytest.fixture(params=["torch", "flashinfer"])
def engine_of(request: pytest.FixtureRequest) -> Iterator[type[AttentionEngine]]:
    if request.param == "torch":
        yield TorchEngine
        return
    with fake_flashinfer.installed():
        from piehost.gpu_backend.flashinfer_engine import FlashInferEngine

        yield FlashInferEngine


@dataclass
class Segment:
    """`slots`: attended slots in order, the inputs' own last."""

    count: int
    slots: list[int]
    positions: list[int]
    paged: bool = False
    mask: np.ndarray | None = None  # bool [count, len(slots)]


@dataclass
class World:
    """A pool with some written slots, and what the reference knows of them."""

    pool: KvPool = field(default_factory=make_pool)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def fill(self, slots: list[int], positions: list[int]) -> None:
        k, v = (
            torch.from_numpy(self.random.normal(size=(len(slots), KV_HEADS, DIM))).float()
            for _ in range(2)
        )
        self.pool.write(0, torch.tensor(slots), k, v)
        self.pool.mark_written(torch.tensor(slots), torch.tensor(positions))

    def attend(
        self,
        engine: type[AttentionEngine],
        segments: list[Segment],
        window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        """Runs a step's attention and compares every output with the reference."""
        segments = sorted(segments, key=lambda s: not s.paged)
        batch = batch_of(segments)
        slots, positions = torch.from_numpy(batch.write_slots), torch.from_numpy(batch.positions)
        self.pool.mark_written(slots, positions)
        made = engine(self.pool)  # type: ignore[call-arg]
        made.plan(batch)
        q, k, v = (
            torch.from_numpy(self.random.normal(size=(len(slots), h, DIM))).float()
            for h in (HEADS, KV_HEADS, KV_HEADS)
        )
        made.write(0, k, v)
        got = made.attend(0, q, 0.3, window, softcap)
        expected = self.reference(segments, q, window, softcap)
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    def reference(
        self, segments: list[Segment], q: torch.Tensor, window: int | None, softcap: float | None
    ) -> torch.Tensor:
        out = torch.zeros_like(q)
        at = 0
        for segment in segments:
            for i in range(segment.count):
                p = segment.positions[i]
                keys = [
                    slot
                    for j, slot in enumerate(segment.slots)
                    if self.may_attend(segment, i, j, p, window)
                ]
                for head in range(HEADS):
                    k = self.pool.keys(0)[keys, head // (HEADS // KV_HEADS)]
                    v = self.pool.values(0)[keys, head // (HEADS // KV_HEADS)]
                    scores = k @ q[at, head] * 0.3
                    if softcap is not None:
                        scores = softcap * torch.tanh(scores / softcap)
                    if keys:
                        out[at, head] = scores.softmax(0) @ v
                at += 1
        return out

    def may_attend(
        self, segment: Segment, i: int, j: int, position: int, window: int | None
    ) -> bool:
        slot = segment.slots[j]
        own = int(self.pool.position[slot])
        if own < 0 or (window is not None and own <= position - window):
            return False
        if segment.mask is not None:
            return bool(segment.mask[i, j])
        return bool(self.pool.visible[slot]) and own <= position


def batch_of(segments: list[Segment]) -> AttentionBatch:
    paged = [s for s in segments if s.paged]
    listed = [s for s in segments if not s.paged]
    return AttentionBatch.of(
        Step(
            0,
            positions=i32([p for s in segments for p in s.positions]),
            write_slots=i32([x for s in segments for x in s.slots[len(s.slots) - s.count :]]),
            paged_inputs=i32([s.count for s in paged]),
            paged_kv=i32([len(s.slots) for s in paged]),
            paged_pages=i32([slot // PAGE for s in paged for slot in s.slots[::PAGE]]),
            listed_inputs=i32([s.count for s in listed]),
            listed_kv=i32([len(s.slots) for s in listed]),
            listed_slots=i32([slot for s in listed for slot in s.slots]),
            listed_masks=[
                None if s.mask is None else np.packbits(s.mask, axis=1, bitorder="little").tobytes()
                for s in listed
            ],
        )
    )


def paged(world: World, pages: list[int], length: int, count: int, base: int = 0) -> Segment:
    """A page run of `length` slots whose last `count` are inputs."""
    slots = [page * PAGE + offset for page in pages for offset in range(PAGE)][:length]
    positions = list(range(base, base + length))
    world.fill(slots, positions)
    return Segment(count, slots, positions[length - count :], paged=True)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_paged_segments_of_all_sizes(
    engine_of: type[AttentionEngine], window: int | None, softcap: float | None
) -> None:
    world = World()
    segments = [
        paged(world, [3, 1, 7], 20, 1),
        paged(world, [4], 1, 1),
        paged(world, [10, 11], 16, 3, base=40),
        paged(world, [2, 9], 9, 9),
        paged(world, [20, 21, 22], 24, 1),
    ]
    world.attend(engine_of, segments, window, softcap)


def test_one_decode_alone_and_equal_decodes(engine_of: type[AttentionEngine]) -> None:
    world = World()
    world.attend(engine_of, [paged(world, [5, 6], 13, 1)])  # slots side by side
    world.attend(engine_of, [paged(world, [6, 5], 13, 1)])
    world.attend(engine_of, [paged(world, [8], 5, 1), paged(world, [9], 5, 1)])


def test_long_prefills_are_cut_and_still_attend_to_all_before(
    engine_of: type[AttentionEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("piehost.gpu_backend.torch_plan._MOST_INPUTS", 7)
    world = World()
    segments = [paged(world, [0, 2, 4], 24, 20), paged(world, [6, 7], 15, 15)]
    slots = [*range(80, 90), *range(100, 116)]
    world.fill(slots, list(range(26)))
    segments.append(Segment(16, slots, list(range(10, 26))))
    mask = world.random.random((16, 26)) < 0.5
    masked_slots = [*range(120, 130), *range(140, 156)]
    world.fill(masked_slots, list(range(26)))
    segments.append(Segment(16, masked_slots, list(range(10, 26)), mask=mask))
    world.attend(engine_of, segments, window=11)


def test_sizes_far_apart_go_to_different_buckets(
    engine_of: type[AttentionEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("piehost.gpu_backend.torch_plan._WASTE", 0)
    world = World()
    segments = [
        paged(world, [1], 2, 1),
        paged(world, [2, 3, 4, 5, 6], 39, 1),
        paged(world, [7], 3, 1),
        paged(world, [8, 9, 10, 11], 30, 1),
        paged(world, [12, 13], 10, 6),
    ]
    world.attend(engine_of, segments)


def test_unwritten_and_invisible_slots_are_never_attended(
    engine_of: type[AttentionEngine],
) -> None:
    world = World()
    written = list(range(0, 30, 2))
    world.fill(written, list(range(15)))
    world.pool.visible[[4, 10]] = False
    world.attend(engine_of, [Segment(2, [*range(30), 40, 41], [15, 16])])


def test_a_slot_at_a_later_position_is_not_attended(engine_of: type[AttentionEngine]) -> None:
    world = World()
    world.fill([0, 1, 2, 3], [7, 3, 9, 8])
    world.attend(engine_of, [Segment(2, [0, 1, 2, 3, 50, 51], [8, 5])])


def test_a_mask_decides_alone_but_for_unwritten_slots_and_windows(
    engine_of: type[AttentionEngine],
) -> None:
    world = World()
    world.fill([0, 1, 2, 4, 5], [0, 1, 2, 30, 4])
    world.pool.visible[1] = False
    mask = np.ones((3, 9), bool)
    mask[1, [0, 4]] = False
    segment = Segment(3, [0, 1, 2, 3, 4, 5, 60, 61, 62], [5, 6, 7], mask=mask)
    world.attend(engine_of, [segment])
    world.attend(engine_of, [segment], window=4)


def test_a_query_with_nothing_to_attend_to_gives_zeros(engine_of: type[AttentionEngine]) -> None:
    world = World()
    mask = np.zeros((2, 3), bool)
    mask[1, 2] = True
    world.fill([9], [0])
    world.attend(engine_of, [Segment(2, [9, 64, 65], [4, 5], mask=mask)])


@st.composite
def listed_segments(draw: st.DrawFn) -> tuple[int, list[Segment], int | None]:
    seed = draw(st.integers(0, 2**16))
    random = np.random.default_rng(seed)
    segments = []
    free = iter(random.permutation(PAGES * PAGE).tolist())
    for _ in range(draw(st.integers(1, 4))):
        count, reads = draw(st.integers(1, 6)), draw(st.integers(0, 20))
        slots = [next(free) for _ in range(count + reads)]
        mask = random.random((count, len(slots))) < 0.5 if draw(st.booleans()) else None
        positions = random.integers(0, 30, count).tolist()
        segments.append(Segment(count, slots, positions, mask=mask))
    return seed, segments, draw(st.sampled_from([None, 1, 8]))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=listed_segments())
def test_any_listed_segments(
    engine_of: type[AttentionEngine], case: tuple[int, list[Segment], int | None]
) -> None:
    seed, segments, window = case
    world = World(random=np.random.default_rng(seed))
    for segment in segments:
        reads = segment.slots[: len(segment.slots) - segment.count]
        written = [slot for slot in reads if world.random.random() < 0.8]
        if written:
            world.fill(written, world.random.integers(0, 30, len(written)).tolist())
            world.pool.visible[written] = torch.from_numpy(world.random.random(len(written)) < 0.8)
    segments = [*segments, paged_beside(world, segments)]
    world.attend(engine_of, segments, window)


def paged_beside(world: World, segments: list[Segment]) -> Segment:
    """A paged segment in a page that no listed one touches, in the same step."""
    used = {slot // PAGE for s in segments for slot in s.slots}
    page = next((p for p in range(PAGES) if p not in used), PAGES)
    return paged(world, [page], 5, 2)


def test_a_mask_of_the_wrong_size_is_refused(engine_of: type[AttentionEngine]) -> None:
    world = World()
    batch = batch_of([Segment(2, [0, 1, 2], [0, 1], mask=np.ones((2, 3), bool))])
    batch.masks = [b"\xff"]
    made = engine_of(world.pool)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="mask"):
        made.plan(batch)
