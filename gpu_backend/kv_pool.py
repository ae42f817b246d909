"""The KV pool: keys, values, positions and visible bits of every slot, and the hidden-state rows.

A slot is `page * page_size + offset`. After the last page come the scratch slots, for inputs whose
keys and values nobody keeps, and one null page that nobody ever writes: padding points at it, so
that an attention kernel never touches another sequence's numbers, not even with weight zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from piehost.wire.step import Step

from .batch import Ints, integers

SCRATCH_SLOTS: Final = 512


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps a slot, and how many query heads read it."""

    heads: int
    kv_heads: int
    head_dim: int


class KvPool:
    """Device memory of the pool.

    kv[layer]: [2, pages + scratch pages + 1, page_size, kv_heads, head_dim] (FlashInfer's NHD)
    position:  i32 [slots], -1 = unwritten; visible: bool [slots]
    rows:      [rows, hidden_size] final hidden states
    """

    def __init__(
        self,
        layers: list[LayerShape],
        *,
        pages: int,
        page_size: int,
        rows: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers = layers
        self.pages = pages
        self.page_size = page_size
        self.device = device
        all_pages = pages + SCRATCH_SLOTS // page_size + 1
        self.slots = all_pages * page_size
        self.null_page = all_pages - 1
        self.null_slot = self.null_page * page_size
        self.kv = [
            zeros((2, all_pages, page_size, s.kv_heads, s.head_dim), dtype, device) for s in layers
        ]
        self.position = torch.full((self.slots,), -1, dtype=torch.int32, device=device)
        self.visible = torch.ones(self.slots, dtype=torch.bool, device=device)
        self.rows = torch.zeros(rows, hidden_size, dtype=dtype, device=device)

    def keys(self, layer: int) -> torch.Tensor:
        """[slots, kv_heads, head_dim] view."""
        return self.kv[layer][0].flatten(0, 1)

    def values(self, layer: int) -> torch.Tensor:
        """[slots, kv_heads, head_dim] view."""
        return self.kv[layer][1].flatten(0, 1)

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores k and v [T, kv_heads, head_dim] of one layer at `slots` i64 [T]."""
        self.keys(layer).index_copy_(0, slots, k)
        self.values(layer).index_copy_(0, slots, v)

    def upload(self, values: Ints) -> torch.Tensor:
        """`values` on the device, without waiting for the copy."""
        tensor = torch.from_numpy(values)
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    @property
    def positions(self) -> torch.Tensor:
        """[all pages, page_size] view of `position`."""
        return self.position.view(-1, self.page_size)

    @property
    def visibility(self) -> torch.Tensor:
        """[all pages, page_size] view of `visible`."""
        return self.visible.view(-1, self.page_size)

    def clear(self, step: Step) -> None:
        """The step's clearing, which goes first. IndexError for a slot that is not there."""
        if step.clear_pages:
            self.positions.index_fill_(0, self.upload(integers(step.clear_pages)), -1)
        if step.clear_slots:
            self.forget(self.upload(integers(step.clear_slots)))

    def apply(self, step: Step) -> None:
        """The step's copies and visible bits, which come after clearing and swapping.

        All copies of one step read before any writes. IndexError for a slot that is not there.
        """
        if step.copy_source:
            self._copy(
                self.upload(integers(step.copy_source)), self.upload(integers(step.copy_target))
            )
        if step.hide:
            self.visible.index_fill_(0, self.upload(integers(step.hide)), False)
        if step.show:
            self.visible.index_fill_(0, self.upload(integers(step.show)), True)

    def forget(self, slots: torch.Tensor) -> None:
        """Makes `slots` i64 as if never written: writing them again makes them visible."""
        self.position.index_fill_(0, slots, -1)

    def mark_written(self, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """Records `positions` i64 [T] at `slots` i64 [T]; a written slot is visible."""
        self.position.index_copy_(0, slots, positions.to(torch.int32))
        self.visible.index_fill_(0, slots, True)

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        for kv in self.kv:
            flat = kv.flatten(1, 2)
            flat.index_copy_(1, target, flat.index_select(1, source))
        self.position.index_copy_(0, target, self.position.index_select(0, source))
        self.visible.index_copy_(0, target, self.visible.index_select(0, source))


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros. On the CPU the kernel hands out the memory page by page on first use: torch.zeros
    would touch all of it, 0.9 s a GiB at start, and hold it for ever."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    octets = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(octets).view(dtype).view(shape)
