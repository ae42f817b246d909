"""The `flashinfer` attention engine (CUDA): paged segments by page table, listed ones slot by slot
with a custom mask.

It has not run on a GPU yet. It is written against the documented API of flashinfer-python 0.6, and
tested on the CPU with a stand-in for FlashInfer's two wrappers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper

from .batch import AttentionBatch, Ints
from .flashinfer_plan import ListedTable, listed_table, paged_tables
from .kv_pool import KvPool, LayerShape

_WORKSPACE_BYTES: Final = 128 << 20  # FlashInfer's recommendation
_HEAD_DIMS: Final = (64, 128, 256)
_DECODE_GROUPS: Final = (1, 2, 4, 8)  # query heads a kv head of the kernels without tensor cores
_BACKEND: Final = "fa2"  # the one that takes windows, soft caps and custom masks everywhere


def why_not(layers: list[LayerShape], dtype: torch.dtype) -> str | None:
    """What keeps FlashInfer from serving such layers, or None."""
    if dtype not in (torch.float16, torch.bfloat16):
        return "it computes in float16 and bfloat16 only"
    dims = sorted({shape.head_dim for shape in layers} - set(_HEAD_DIMS))
    return f"it has no kernels for heads of {dims[0]}" if dims else None


class _Variant(NamedTuple):
    """What a FlashInfer plan depends on besides the batch: layers alike share one."""

    shape: LayerShape
    scaling: float
    window: int | None
    softcap: float | None


# a part of the step: the inputs it covers (None: all, in order), and how to attend
_Part = tuple[torch.Tensor | None, Callable[[int, torch.Tensor], torch.Tensor]]


class FlashInferEngine:
    """See `engine.AttentionEngine`."""

    name = "flashinfer"

    def __init__(self, pool: KvPool) -> None:
        self._pool = pool
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=pool.device)
        self._wrappers: dict[tuple[str, _Variant], Any] = {}
        self._planned: dict[_Variant, list[_Part]] = {}

    def plan(self, batch: AttentionBatch) -> None:
        self._planned.clear()  # a variant is planned when its first layer comes
        self._positions = self._pool.upload(batch.positions)
        self._write_slots = self._pool.upload(batch.write_slots)
        self._decode, self._prefill = paged_tables(batch, self._pool.page_size)
        self._listed = listed_table(batch)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self._pool.write(layer, self._write_slots, k, v)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        variant = _Variant(self._pool.layers[layer], scaling, window, softcap)
        if variant not in self._planned:
            self._planned[variant] = self._plan_variant(variant, q.dtype)
        q = q.contiguous()
        parts = self._planned[variant]
        if len(parts) == 1:
            return parts[0][1](layer, q)
        out = torch.empty_like(q)
        for inputs, attend in parts:
            assert inputs is not None
            out.index_copy_(0, inputs, attend(layer, q.index_select(0, inputs)))
        return out

    def _plan_variant(self, variant: _Variant, dtype: torch.dtype) -> list[_Part]:
        found: list[tuple[Ints, Callable[[int, torch.Tensor], torch.Tensor]]] = []
        if len(self._decode.inputs):
            found.append((self._decode.inputs, self._plan_decode(variant, dtype)))
        if len(self._prefill.inputs):
            found.append((self._prefill.inputs, self._plan_prefill(variant, dtype)))
        if len(self._listed.inputs):
            found.append((self._listed.inputs, self._plan_listed(variant, dtype)))
        if len(found) == 1:
            return [(None, found[0][1])]
        return [(self._pool.upload(inputs), attend) for inputs, attend in found]

    def _plan_decode(
        self, variant: _Variant, dtype: torch.dtype
    ) -> Callable[[int, torch.Tensor], torch.Tensor]:
        shape, table = variant.shape, self._decode
        wrapper = self._wrapper("decode", variant)
        wrapper.plan(
            _i32(table.indptr),
            _i32(table.indices),
            _i32(table.last_page_len),
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            self._pool.page_size,
            **_numbers(variant, dtype, variant.window),
        )
        return lambda layer, q: _run(wrapper, q, self._pool.kv[layer])

    def _plan_prefill(
        self, variant: _Variant, dtype: torch.dtype
    ) -> Callable[[int, torch.Tensor], torch.Tensor]:
        shape, table = variant.shape, self._prefill
        wrapper = self._wrapper("prefill", variant)
        wrapper.plan(
            _i32(table.input_indptr),
            _i32(table.indptr),
            _i32(table.indices),
            _i32(table.last_page_len),
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            self._pool.page_size,
            causal=True,
            **_numbers(variant, dtype, variant.window),
        )
        return lambda layer, q: _run(wrapper, q, self._pool.kv[layer])

    def _plan_listed(
        self, variant: _Variant, dtype: torch.dtype
    ) -> Callable[[int, torch.Tensor], torch.Tensor]:
        """The window is part of the custom mask: FlashInfer would count it in slots, and here a
        slot's place says nothing about its position."""
        shape, table = variant.shape, self._listed
        slots, mask, nothing = self._who_attends(table, variant.window)
        wrapper = self._wrapper("listed", variant)
        wrapper.plan(
            _i32(table.input_indptr),
            _i32(table.indptr),
            slots.to(torch.int32),
            torch.ones(len(table.indptr) - 1, dtype=torch.int32),
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            1,
            custom_mask=mask,
            **_numbers(variant, dtype, None),
        )

        def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
            one_slot_pages = self._pool.kv[layer].flatten(1, 2).unsqueeze(2)
            return _run(wrapper, q, one_slot_pages).masked_fill(nothing[:, None, None], 0)

        return attend

    def _who_attends(
        self, table: ListedTable, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(slots i64 [indptr[-1]], unwritten ones replaced by the null slot; the flattened mask
        bool [E]; bool [Q] the inputs that attend to nothing)."""
        pool = self._pool
        slots = pool.upload(table.slots)
        position = pool.position[slots]
        pair_slot, pair_input = pool.upload(table.pair_slot), pool.upload(table.pair_input)
        key = position[pair_slot]
        query = self._positions[pool.upload(table.inputs)][pair_input]
        masked = torch.from_numpy(table.masked).to(pool.device)
        bit = torch.from_numpy(table.bit).to(pool.device)
        may = torch.where(masked, bit, pool.visible[slots][pair_slot] & (key <= query))
        may &= key >= 0
        if window is not None:
            may &= key > query - window
        count = torch.zeros(len(table.inputs), dtype=torch.int32, device=pool.device)
        nothing = count.index_add_(0, pair_input, may.to(torch.int32)) == 0
        return torch.where(position >= 0, slots, pool.null_slot), may, nothing

    def _wrapper(self, kind: str, variant: _Variant) -> Any:
        if (kind, variant) not in self._wrappers:
            if kind == "decode":
                group = variant.shape.heads // variant.shape.kv_heads
                wrapper = BatchDecodeWithPagedKVCacheWrapper(
                    self._workspace,
                    "NHD",
                    use_tensor_cores=group not in _DECODE_GROUPS,
                    backend=_BACKEND,
                )
            else:
                wrapper = BatchPrefillWithPagedKVCacheWrapper(
                    self._workspace, "NHD", backend=_BACKEND
                )
            self._wrappers[kind, variant] = wrapper
        return self._wrappers[kind, variant]


def _run(wrapper: Any, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """kv [2, pages, page_size, kv_heads, head_dim]."""
    result: torch.Tensor = wrapper.run(q, (kv[0], kv[1]))
    return result


def _numbers(variant: _Variant, dtype: torch.dtype, window: int | None) -> dict[str, Any]:
    return {
        "sm_scale": variant.scaling,
        "window_left": -1 if window is None else window - 1,  # counts the input's own slot out
        "logits_soft_cap": variant.softcap or 0.0,
        "q_data_type": dtype,
        "kv_data_type": dtype,
    }


def _i32(values: Ints) -> torch.Tensor:
    """On the host: FlashInfer plans there and uploads by itself."""
    return torch.from_numpy(values).to(torch.int32)
