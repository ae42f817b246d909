"""FlashInfer's two wrappers as documented for 0.6, computed naively: a stand-in for the GPU.

Arguments are spelt out as there, so a call that the real wrappers would not take fails here too.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        *,
        backend: str = "auto",
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "NHD"

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        tables = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(table.dtype == torch.int32 for table in tables)
        self._tables = [table.tolist() for table in tables]
        self._shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self._mask, self._causal, self._scale = custom_mask, causal, sm_scale
        self._window, self._cap = window_left, logits_soft_cap or 0.0
        self._dtype = q_data_type

    def run(
        self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        inputs, indptr, indices, last = self._tables
        heads, kv_heads, dim, page_size = self._shape
        assert q.shape == (inputs[-1], heads, dim)
        assert q.dtype == self._dtype
        for cache in paged_kv_cache:
            assert cache.shape[1:] == (page_size, kv_heads, dim)
        out = torch.full_like(q, float("nan"))
        mask_at = 0
        for i in range(len(last)):
            pages = indices[indptr[i] : indptr[i + 1]]
            length = (len(pages) - 1) * page_size + last[i]
            assert 1 <= last[i] <= page_size
            k, v = (c[pages].flatten(0, 1)[:length] for c in paged_kv_cache)
            own = q[inputs[i] : inputs[i + 1]]
            count = len(own)
            place = torch.arange(length - count, length)[:, None]
            keys = torch.arange(length)[None]
            may = torch.ones(count, length, dtype=torch.bool)
            if self._mask is not None:
                assert self._mask.dtype == torch.bool
                may = self._mask[mask_at : mask_at + count * length].view(count, length)
                mask_at += count * length
            elif self._causal:
                may = keys <= place
            if self._window >= 0:
                may = may & (keys >= place - self._window)
            k = k.repeat_interleave(heads // kv_heads, 1)
            v = v.repeat_interleave(heads // kv_heads, 1)
            scores = torch.einsum("qhd,khd->hqk", own.float(), k.float()) * self._scale
            if self._cap > 0:
                scores = self._cap * torch.tanh(scores / self._cap)
            weights = scores.masked_fill(~may, float("-inf")).softmax(-1)
            out[inputs[i] : inputs[i + 1]] = torch.einsum("hqk,khd->qhd", weights, v.float()).to(
                q.dtype
            )
        if self._mask is not None:
            assert mask_at == len(self._mask)
        return out


class BatchDecodeWithPagedKVCacheWrapper:
    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        *,
        use_tensor_cores: bool = False,
        backend: str = "auto",
    ) -> None:
        self._prefill = BatchPrefillWithPagedKVCacheWrapper(
            float_workspace_buffer, kv_layout, backend=backend
        )

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        self._prefill.plan(
            torch.arange(len(last_page_len) + 1, dtype=torch.int32),
            indptr,
            indices,
            last_page_len,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
            causal=True,
            sm_scale=sm_scale,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
        )

    def run(
        self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        return self._prefill.run(q, paged_kv_cache)


@contextmanager
def installed() -> Iterator[None]:
    """`import flashinfer` finds this module inside the block."""
    module = types.ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = BatchPrefillWithPagedKVCacheWrapper  # type: ignore[attr-defined]
    module.BatchDecodeWithPagedKVCacheWrapper = BatchDecodeWithPagedKVCacheWrapper  # type: ignore[attr-defined]
    before = sys.modules.get("flashinfer")
    sys.modules["flashinfer"] = module
    try:
        yield
    finally:
        if before is None:
            del sys.modules["flashinfer"]
        else:
            sys.modules["flashinfer"] = before
