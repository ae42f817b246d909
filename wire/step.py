"""Controller and backend: one message a step, one answer a step.

Arrays travel as little-endian bytes of the stated dtype and shape. T inputs, P paged and L listed
segments, M hidden rows kept, K samples. A *slot* is `page * page_size + offset`; a *row* is an
entry of the hidden-state pool; a *segment* is one forward call's share of the step.

A step runs in this order: clear pages, clear slots, swap out, swap in, copy, hide, show, vectors
in, forward, sample and dists, vectors out. A *place* is a page's worth of host memory.
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
    tokens: bytes = b""  # i32[T] token id, or ~late token; 0 where `vector_inputs` has the input
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
    # distributions: (row, k, ring, byte offset); a sample's own among them
    dists: list[tuple[int, int, int, int]] = []
    # vectors from rings in to rows: (ring, byte offset, count), f32[count, hidden] each
    vectors: list[tuple[int, int, int]] = []
    vector_into: bytes = b""  # i32[sum of counts] row
    # inputs that are vectors
    vector_inputs: bytes = b""  # i32[*] index into the inputs
    vector_rows: bytes = b""  # i32[*] row
    # vectors to rings out: (ring, byte offset, count), f32[count, hidden] each
    embeds: list[tuple[int, int, int]] = []
    embed_from: bytes = b""  # i32[sum of counts] row, or ~token id: that token's embedding
    # what samples have beside their parameters; index is that of the sample
    masks: list[tuple[int, int, int]] = []  # (index, ring, byte offset) of ceil(vocab / 8) octets
    bias_samples: bytes = b""  # i32[B] index, ascending
    bias_tokens: bytes = b""  # i32[B]
    bias_values: bytes = b""  # f32[B] added to the logits
    # (index, repetition, presence, frequency, prompt tokens, all tokens of its history)
    penalties: list[tuple[int, float, float, float, int, int]] = []
    history: bytes = b""  # i32[sum of all tokens] token id, or ~late token; prompts first
    logprobs: bytes = b""  # i32[*] index of samples whose log-probability is wanted
    # pages to host memory and back: K, V, positions and visible bits of all slots
    swap_out_pages: bytes = b""  # i32[O]
    swap_out_places: bytes = b""  # i32[O]
    swap_in_places: bytes = b""  # i32[I]
    swap_in_pages: bytes = b""  # i32[I]


class StepDone(Struct, array_like=True, tag="done"):
    step: int
    tokens: bytes = b""  # i32[K]; -1 if the sample's mask allows no token, or its ring is gone
    dists: list[int] = []  # entries written for each dist; -1 if its ring is gone
    seconds: float = 0.0  # the backend was busy with this step for so long
    error: str | None = None  # the step failed as a whole; nothing of it counts
    logprobs: bytes = b""  # f32[*], as asked for
    refused: list[int] = []  # index into `vectors`: not finite, or the ring is gone; zeros instead
    embeds: list[int] = []  # vectors written for each of `embeds`; -1 if its ring is gone


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
    special_tokens: dict[str, str] = {}  # for the chat template; see control.Configure
    swap_pages: int = 0  # places in host memory


class LoadFailed(Struct, array_like=True, tag="failed"):
    message: str
    hint: str


class AddRing(Struct, array_like=True, tag="add_ring"):
    """Host to backend, with two memfds: map ring out for writing, ring in for reading, then answer
    `RingMapped`. The sizes are in octets."""

    ring: int
    size: int
    in_size: int


class RingMapped(Struct, array_like=True, tag="ring_mapped"):
    ring: int


class DropRing(Struct, array_like=True, tag="drop_ring"):
    ring: int


BackendToHost: TypeAlias = Progress | Ready | LoadFailed | RingMapped
HostToBackend: TypeAlias = AddRing | DropRing
