"""Swap space: host memory that pages of the KV pool move to while nobody attends to them.

A *place* holds a page: keys and values of all layers side by side as one record, so that a page is
one copy between host and device. Positions and visible bits are small and stay on the device.
Copies and forward passes share the device's stream: a page is never read before it is back.
"""

from __future__ import annotations

from typing import Final

import psutil
import torch

from piehost.wire.step import Step

from .batch import Ints, integers
from .errors import LoadError
from .kv_pool import KvPool, zeros

_FREE_MEMORY: Final = 0.25  # of the host: the default takes no more
_PORTION_BYTES: Final = 32 << 20  # of device memory that pages are gathered in


class SwapSpace:
    """Room for `pages` pages of `pool`; None: as many as the pool has, at most a quarter of the
    host's free memory. 0 is none. LoadError if the host has not that much.

    records:  [pages, numbers a page] of the pool's dtype, on the host (pinned for CUDA)
    position: i32 [pages, page_size]; visible: bool [pages, page_size]
    """

    def __init__(self, pool: KvPool, pages: int | None) -> None:
        self._pool = pool
        self._sizes = [kv[:, 0].numel() for kv in pool.kv]  # numbers a page, by layer
        width, dtype = sum(self._sizes), pool.rows.dtype
        octets = width * dtype.itemsize
        if pages is None:
            free = int(psutil.virtual_memory().available * _FREE_MEMORY)
            pages = min(pool.pages, free // octets)
        self.pages = pages
        if not pages:
            return
        cuda = pool.device.type == "cuda"
        portion = min(pages, max(1, _PORTION_BYTES // octets))
        try:
            if cuda:
                self._records = torch.empty((pages, width), dtype=dtype, pin_memory=True)
            else:
                self._records = zeros((pages, width), dtype, pool.device)
            self._portion = torch.empty((portion, width), dtype=dtype, device=pool.device)
        except (RuntimeError, MemoryError) as error:
            raise LoadError(
                f"no host memory for {pages} pages of {octets} octets to swap to",
                "give a smaller --swap-pages, or 0",
            ) from error
        shape = (pages, pool.page_size)
        self._position = torch.full(shape, -1, dtype=torch.int32, device=pool.device)
        self._visible = torch.ones(shape, dtype=torch.bool, device=pool.device)

    def move(self, step: Step) -> None:
        """The step's swaps, pages out before pages in. IndexError for one that is not there."""
        self._out(integers(step.swap_out_pages), integers(step.swap_out_places))
        self._in(integers(step.swap_in_places), integers(step.swap_in_pages))

    def _out(self, pages: Ints, places: Ints) -> None:
        pool, most = self._pool, len(self._portion) if len(pages) else 1
        for at in range(0, len(pages), most):
            source = pool.upload(pages[at : at + most])
            target = places[at : at + most]
            part = self._portion[: len(target)]
            for kv, columns in zip(pool.kv, torch.split(part, self._sizes, dim=1), strict=True):
                _by_page(columns, kv).copy_(kv.index_select(1, source))
            for place, record in zip(target.tolist(), part, strict=True):
                self._records[place].copy_(record, non_blocking=True)
            to = pool.upload(target)
            self._position.index_copy_(0, to, pool.positions.index_select(0, source))
            self._visible.index_copy_(0, to, pool.visibility.index_select(0, source))

    def _in(self, places: Ints, pages: Ints) -> None:
        pool, most = self._pool, len(self._portion) if len(pages) else 1
        for at in range(0, len(pages), most):
            target = pool.upload(pages[at : at + most])
            source = places[at : at + most]
            part = self._portion[: len(source)]
            for place, record in zip(source.tolist(), part, strict=True):
                record.copy_(self._records[place], non_blocking=True)
            for kv, columns in zip(pool.kv, torch.split(part, self._sizes, dim=1), strict=True):
                kv.index_copy_(1, target, _by_page(columns, kv))
            there = pool.upload(source)
            pool.positions.index_copy_(0, target, self._position.index_select(0, there))
            pool.visibility.index_copy_(0, target, self._visible.index_select(0, there))


def _by_page(columns: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """One layer's columns of n records as [2, n, page_size, kv_heads, head_dim], like `kv`."""
    return columns.view(len(columns), 2, *kv.shape[2:]).transpose(0, 1)
