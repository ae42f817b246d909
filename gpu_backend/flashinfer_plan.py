"""The FlashInfer engine's index arrays, as pure functions of a batch (numpy only).

FlashInfer's page tables: segment i has the pages indices[indptr[i] : indptr[i + 1]], the last of
which holds last_page_len[i] slots. Listed segments are page tables with pages of one slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .batch import AttentionBatch, Ints, pages_of, starts


@dataclass(frozen=True, slots=True)
class PageTable:
    """n segments: their inputs' places in the step and their pages."""

    inputs: Ints  # [Q] index of each input in the step
    input_indptr: Ints  # [n + 1]
    indptr: Ints  # [n + 1]
    indices: Ints  # [indptr[-1]]
    last_page_len: Ints  # [n] 1 .. page size


def paged_tables(batch: AttentionBatch, page_size: int) -> tuple[PageTable, PageTable]:
    """The paged segments of one input (decode) and the longer ones (prefill)."""
    single = batch.paged_inputs == 1
    return (
        _paged_table(batch, page_size, np.flatnonzero(single)),
        _paged_table(batch, page_size, np.flatnonzero(~single)),
    )


def _paged_table(batch: AttentionBatch, page_size: int, members: Ints) -> PageTable:
    count = pages_of(batch.paged_kv, page_size)
    own = count[members]
    inputs = batch.paged_inputs[members]
    return PageTable(
        inputs=_ranges(starts(batch.paged_inputs)[members], inputs),
        input_indptr=starts(inputs),
        indptr=starts(own),
        indices=batch.paged_pages[_ranges(starts(count)[members], own)],
        last_page_len=batch.paged_kv[members] - (own - 1) * page_size,
    )


def _ranges(first: Ints, count: Ints) -> Ints:
    """first[0] .. first[0] + count[0] - 1, first[1] .., one after the other."""
    return np.repeat(first - starts(count)[:-1], count) + np.arange(int(count.sum()))


@dataclass(frozen=True, slots=True)
class ListedTable:
    """L listed segments, and every (input, slot) pair of theirs in the order of FlashInfer's
    flattened custom mask: segment by segment, input by input, slot by slot. E pairs."""

    inputs: Ints  # [Q] index of each input in the step
    input_indptr: Ints  # [L + 1]
    indptr: Ints  # [L + 1]
    slots: Ints  # [indptr[-1]]
    pair_input: Ints  # [E] place in `inputs`
    pair_slot: Ints  # [E] place in `slots`
    masked: npt.NDArray[np.bool_]  # [E] its segment has an explicit mask ...
    bit: npt.NDArray[np.bool_]  # [E] ... which says so


def listed_table(batch: AttentionBatch) -> ListedTable:
    """All listed segments. ValueError if a mask has the wrong size."""
    first = int(batch.paged_inputs.sum())
    inputs, kv = batch.listed_inputs, batch.listed_kv
    rows = int(inputs.sum())
    owner = np.repeat(np.arange(len(inputs)), inputs)  # [Q]
    row_kv = kv[owner]
    masked = np.array([mask is not None for mask in batch.masks], bool)[owner]
    return ListedTable(
        inputs=first + np.arange(rows),
        input_indptr=starts(inputs),
        indptr=starts(kv),
        slots=batch.listed_slots,
        pair_input=np.repeat(np.arange(rows), row_kv),
        pair_slot=_ranges(starts(kv)[owner], row_kv),
        masked=np.repeat(masked, row_kv),
        bit=_mask_bits(batch),
    )


def _mask_bits(batch: AttentionBatch) -> npt.NDArray[np.bool_]:
    """[E] the masks' bits, False where there is none."""
    parts = []
    for mask, inputs, kv in zip(batch.masks, batch.listed_inputs, batch.listed_kv, strict=True):
        if mask is None:
            parts.append(np.zeros(inputs * kv, bool))
            continue
        octets = np.frombuffer(mask, np.uint8)
        if len(octets) != inputs * -(-kv // 8):
            raise ValueError("a mask has the wrong size")
        bits = np.unpackbits(octets.reshape(inputs, -1), axis=1, count=kv, bitorder="little")
        parts.append(bits.astype(bool).ravel())
    return np.concatenate(parts) if parts else np.zeros(0, bool)
