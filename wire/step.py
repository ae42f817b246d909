"""Controller and backend: one message a step, one answer a step.

Arrays travel as little-endian bytes of the stated dtype and shape. T inputs, P paged and L listed
segments, M hidden rows kept, K samples. A *slot* is `page * page_size + offset`; a *row* is an
entry of the hidden-state pool; a *segment* is one forward call's share of the step.

A step runs in this order: clear pages, clear slots, copy, hide, show, forward, sample and dists.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from inferlet.abi import ModelInfo
from msgspec import Struct

# Late-bound tokens: sample k of step s is late token (s % LATE_STEPS) * MAX_SAMPLES + k.
# An input token t < 0 stands for late token ~t. At most MAX_IN_FLIGHT steps are unanswered.
MAX_IN_FLIGHT: Final = 2
LATE_STEPS: Final = 4
MAX_SAMPLES: Final = 4096


class Step(Struct, array_like=True, tag="step"):
    step: int
    # slot bookkeeping
    clear_pages: bytes = b""  # i32[*], newly allocated: no slot written
    clear_slots: bytes = b""  # i32[*], as if never written
    copy_source: bytes = b""  # i32[C] slots; K, V, position and visible bit are copied
    copy_target: bytes = b""  # i32[C] slots
    hide: bytes = b""  # i32[*] slots made invisible
    show: bytes = b""  # i32[*] slots made visible
    # inputs, paged segments first, then listed ones
    tokens: bytes = b""  # i32[T] token id, or ~late token
    positions: bytes = b""  # i32[T]
    write_slots: bytes = b""  # i32[T]
    # paged: slot i of the page run holds position base + i, the inputs are its last slots, no
    # mask: input j of q attends the first kv - q + j + 1 slots
    paged_inputs: bytes = b""  # i32[P] inputs of each segment
    paged_kv: bytes = b""  # i32[P] slots of the run, inputs included
    paged_pages: bytes = b""  # i32[sum(ceil(paged_kv / page_size))]
    # listed: any slots, inputs' own last; a slot counts if written and, without a mask, if it is
    # visible and its position is at most the input's
    listed_inputs: bytes = b""  # i32[L]
    listed_kv: bytes = b""  # i32[L]
    listed_slots: bytes = b""  # i32[sum(listed_kv)]
    listed_masks: list[bytes | None] = []  # L entries; rows of packed bits, LSB first
    # hidden states to keep
    keep_inputs: bytes = b""  # i32[M] index into the inputs
    keep_rows: bytes = b""  # i32[M] row
    # samples
    sample_rows: bytes = b""  # i32[K] row
    temperature: bytes = b""  # f32[K], 0 is greedy
    top_k: bytes = b""  # i32[K], 0 is off
    top_p: bytes = b""  # f32[K], 1 is off
    min_p: bytes = b""  # f32[K], 0 is off
    uniform: bytes = b""  # f64[K] in [0, 1): the draw (inverse CDF, most probable first)
    # distributions: (row, k, ring, byte offset)
    dists: list[tuple[int, int, int, int]] = []


class StepDone(Struct, array_like=True, tag="done"):
    step: int
    tokens: bytes = b""  # i32[K]
    dists: list[int] = []  # entries written for each dist; -1 if its ring is gone
    seconds: float = 0.0  # the backend was busy with this step for so long
    error: str | None = None  # the step failed as a whole; nothing of it counts


class Progress(Struct, array_like=True, tag="progress"):
    """Backend to host while loading."""

    stage: str
    fraction: float


class Ready(Struct, array_like=True, tag="ready"):
    """Backend to host: loaded. Carries two descriptors: vocabulary table, tokenizer JSON."""

    model: ModelInfo
    pages: int
    rows: int
    scratch_slots: int  # slots pages * page_size .. + scratch_slots - 1 keep nothing
    device: str
    engine: str
    load_seconds: float


class LoadFailed(Struct, array_like=True, tag="failed"):
    message: str
    hint: str


class AddRing(Struct, array_like=True, tag="add_ring"):
    """Host to backend, with the memfd: map it for writing, then answer `RingMapped`."""

    ring: int
    size: int


class RingMapped(Struct, array_like=True, tag="ring_mapped"):
    ring: int


class DropRing(Struct, array_like=True, tag="drop_ring"):
    ring: int


BackendToHost: TypeAlias = Progress | Ready | LoadFailed | RingMapped
HostToBackend: TypeAlias = AddRing | DropRing
