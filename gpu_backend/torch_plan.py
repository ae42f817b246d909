"""How the torch engine turns a ragged batch into rectangles, once a step, without a loop per
sequence.

Segments of like input count (by power of two) and like length share a bucket of B segments, N
inputs and S slots. Missing slots point at the pool's null slot and are masked. Missing inputs
repeat the segment's last one: they compute its result again, so writing it twice is harmless.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import torch

from .batch import AttentionBatch, Ints, pages_of, starts
from .kv_pool import KvPool

# Longer segments are cut, so that scores stay small and early inputs skip later keys.
_MOST_INPUTS: Final = 256
# A bucket may waste this many slots on padding (or as many as it uses) before one more bucket,
# about ten kernel calls a layer, is worth it.
_WASTE: Final = 2048


@dataclass(slots=True)
class Bucket:
    """B segments of N inputs over S slots. Tensors are on the device."""

    segments: int  # B
    width: int  # N
    length: int  # S
    inputs: torch.Tensor  # i64 [B * N], index of each input in the step
    whole: bool  # `inputs` is 0 .. T - 1
    slots: torch.Tensor  # i64 [B, S]
    run: int | None  # where the slots start, if B = 1 and they lie side by side
    allowed: torch.Tensor | None  # bool [B, N, S]; None: every input attends to every slot
    may_be_empty: bool  # an input may have nothing to attend to
    key_order: torch.Tensor  # i64 [B or 1, 1, S] a key's place (paged) or position (listed)
    input_order: torch.Tensor  # i64 [B, N, 1] the same for inputs: windows count back from it
    _bias: dict[int | None, tuple[torch.Tensor | None, torch.Tensor | None]] = field(
        default_factory=dict
    )
    _rows: dict[int, torch.Tensor] = field(default_factory=dict)

    def bias(
        self, window: int | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(0 or -inf [B, 1, N, 1, S], bool [B, 1, N, 1, 1]), each None if it changes nothing.

        The second says which inputs have nothing to attend to; the first leaves them open, so
        that softmax makes no NaN, and the caller gives them zeros.
        """
        if window not in self._bias:
            self._bias[window] = self._make_bias(window, dtype)
        return self._bias[window]

    def _make_bias(
        self, window: int | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        may = self.allowed
        if window is not None:
            near = self.key_order > self.input_order - window
            may = near if may is None else may & near
        if may is None:
            return None, None
        nothing = None
        if self.may_be_empty:
            empty = ~may.any(-1, keepdim=True)
            may = may | empty
            nothing = empty[:, None, :, None, :]
        bias = torch.zeros(may.shape, dtype=dtype, device=may.device)
        bias.masked_fill_(~may, float("-inf"))
        return bias[:, None, :, None, :], nothing

    def head_rows(self, kv_heads: int) -> torch.Tensor:
        """i64 [B * kv_heads * S]: rows of the pool seen as [slots * kv_heads, head_dim]."""
        if kv_heads not in self._rows:
            heads = torch.arange(kv_heads, device=self.slots.device)
            rows = self.slots[:, None, :] * kv_heads + heads[:, None]
            self._rows[kv_heads] = rows.flatten()
        return self._rows[kv_heads]


class _Pieces(NamedTuple):
    """Segments, the long ones cut into pieces of at most `_MOST_INPUTS` inputs; i64 [pieces]."""

    owner: Ints  # segment
    first: Ints  # index of the first input in the step
    inputs: Ints
    skipped: Ints  # inputs of the segment before this piece


def _cut(first: Ints, inputs: Ints) -> _Pieces:
    count = -(-inputs // _MOST_INPUTS)
    owner = np.repeat(np.arange(len(inputs)), count)
    skipped = (np.arange(len(owner)) - np.repeat(starts(count)[:-1], count)) * _MOST_INPUTS
    return _Pieces(
        owner, first[owner] + skipped, np.minimum(inputs[owner] - skipped, _MOST_INPUTS), skipped
    )


def group(inputs: Ints, lengths: Ints) -> list[Ints]:
    """Which segments share a bucket: i64 index arrays, each in order, that cover all of them."""
    groups: list[Ints] = []
    sizes = np.ceil(np.log2(np.maximum(inputs, 1))).astype(np.int64)
    for size in np.unique(sizes):
        members = np.flatnonzero(sizes == size)
        members = members[np.argsort(-lengths[members], kind="stable")]
        while len(members):
            own = lengths[members]
            cheap = np.cumsum(own[0] - own) <= _WASTE
            take = int(np.count_nonzero(cheap | (2 * own > own[0])))
            groups.append(np.sort(members[:take]))
            members = members[take:]
    return groups


def _input_index(first: Ints, inputs: Ints) -> tuple[Ints, Ints]:
    """([B, N] place of each input in its piece, padding repeats the last; [B, N] in the step)."""
    place = np.minimum(np.arange(inputs.max()), inputs[:, None] - 1)
    return place, first[:, None] + place


def paged_buckets(batch: AttentionBatch, pool: KvPool) -> Iterator[Bucket]:
    """Buckets of the paged segments."""
    page_size = pool.page_size
    page_at = starts(pages_of(batch.paged_kv, page_size))
    cut = _cut(starts(batch.paged_inputs)[:-1], batch.paged_inputs)
    before = batch.paged_kv[cut.owner] - batch.paged_inputs[cut.owner] + cut.skipped
    lengths = before + cut.inputs  # slots that the piece's last input attends to
    for members in group(cut.inputs, lengths):
        length = lengths[members]
        longest = int(length.max())
        columns = np.arange(-(-longest // page_size))
        own = columns < pages_of(length, page_size)[:, None]
        at = np.where(own, page_at[cut.owner[members]][:, None] + columns, 0)
        table = np.where(own, batch.paged_pages[at], pool.null_page)
        slots = (table[:, :, None] * page_size + np.arange(page_size)).reshape(len(members), -1)
        slots = slots[:, :longest]
        keys = np.arange(longest)
        slots = np.where(keys < length[:, None], slots, pool.null_slot)
        place, inputs = _input_index(cut.first[members], cut.inputs[members])
        order = before[members][:, None] + place
        full = inputs.shape[1] == 1 and bool((length == longest).all())
        key_order = pool.upload(keys)[None, None, :]
        input_order = pool.upload(order)[:, :, None]
        side_by_side = len(members) == 1 and bool((np.diff(table[0]) == 1).all())
        yield Bucket(
            segments=len(members),
            width=inputs.shape[1],
            length=longest,
            inputs=pool.upload(inputs.ravel()),
            whole=_is_whole(inputs, batch),
            slots=pool.upload(slots),
            run=int(slots[0, 0]) if side_by_side else None,
            allowed=None if full else key_order <= input_order,
            may_be_empty=False,
            key_order=key_order,
            input_order=input_order,
        )


def listed_buckets(batch: AttentionBatch, pool: KvPool) -> Iterator[Bucket]:
    """Buckets of the listed segments. The pool knows which slots are written, visible, where."""
    slot_at = starts(batch.listed_kv)
    first = starts(batch.listed_inputs)[:-1] + int(batch.paged_inputs.sum())
    cut = _cut(first, batch.listed_inputs)
    masks = _PackedMasks(batch)
    for members in group(cut.inputs, batch.listed_kv[cut.owner]):
        owner = cut.owner[members]
        length = batch.listed_kv[owner]
        keys = np.arange(length.max())
        own = keys < length[:, None]
        at = np.where(own, slot_at[owner][:, None] + keys, 0)
        listed = pool.upload(np.where(own, batch.listed_slots[at], pool.null_slot))
        place, inputs = _input_index(cut.first[members], cut.inputs[members])
        key_order = pool.position[listed].to(torch.int64)[:, None, :]
        input_order = pool.upload(batch.positions[inputs])[:, :, None]
        written = key_order >= 0
        allowed = pool.visible[listed][:, None, :] & (key_order <= input_order)
        if masks.masked[owner].any():
            bits = masks.rows(owner, place + cut.skipped[members][:, None], length)
            has_mask = torch.from_numpy(masks.masked[owner]).to(pool.device)[:, None, None]
            allowed = torch.where(has_mask, torch.from_numpy(bits).to(pool.device), allowed)
        yield Bucket(
            segments=len(members),
            width=inputs.shape[1],
            length=len(keys),
            inputs=pool.upload(inputs.ravel()),
            whole=_is_whole(inputs, batch),
            slots=torch.where(written[:, 0], listed, pool.null_slot),
            run=None,
            allowed=allowed & written,
            may_be_empty=True,
            key_order=key_order,
            input_order=input_order,
        )


def _is_whole(inputs: Ints, batch: AttentionBatch) -> bool:
    flat = inputs.ravel()
    return len(flat) == len(batch.positions) and bool((np.diff(flat) == 1).all())


class _PackedMasks:
    """The explicit masks of a step, unpacked only where a bucket needs them."""

    def __init__(self, batch: AttentionBatch) -> None:
        self.masked = np.array([mask is not None for mask in batch.masks], bool)  # [L]
        size = np.array([len(mask or b"") for mask in batch.masks], np.int64)
        self._row_bytes = -(-batch.listed_kv // 8)
        if (size != np.where(self.masked, batch.listed_inputs * self._row_bytes, 0)).any():
            raise ValueError("a mask has the wrong size")
        self._at = starts(size)[:-1]
        self._data = np.frombuffer(b"".join(mask or b"" for mask in batch.masks) or b"\0", np.uint8)

    def rows(self, owner: Ints, row: Ints, length: Ints) -> np.ndarray:
        """bool [B, N, max(length)]: row `row` [B, N] of the masks of `owner` [B]; segments
        without a mask give nonsense."""
        keys = np.arange(length.max())
        byte = self._at[owner][:, None, None] + (
            row[:, :, None] * self._row_bytes[owner][:, None, None] + keys // 8
        )
        inside = self.masked[owner][:, None, None] & (keys < length[:, None, None])
        octets = self._data[np.where(inside, byte, 0)]
        return ((octets >> (keys % 8).astype(np.uint8)) & 1).astype(bool) & inside
