"""The `torch` attention engine: plain tensor operations, on the CPU and on CUDA.

A ragged batch becomes a few rectangular buckets (`torch_plan.py`). In a bucket, keys and values are
gathered by slot and kv head, and the query heads that share a kv head lie side by side as rows of
one matrix: K and V are never repeated.
"""

from __future__ import annotations

import torch

from .batch import AttentionBatch
from .kv_pool import KvPool
from .torch_plan import Bucket, listed_buckets, paged_buckets


class TorchEngine:
    """See `engine.AttentionEngine`."""

    name = "torch"

    def __init__(self, pool: KvPool) -> None:
        self._pool = pool
        self._buckets: list[Bucket] = []
        self._write_slots = torch.empty(0, dtype=torch.int64)

    def plan(self, batch: AttentionBatch) -> None:
        self._write_slots = self._pool.upload(batch.write_slots)
        self._buckets = [*paged_buckets(batch, self._pool), *listed_buckets(batch, self._pool)]

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
        if len(self._buckets) == 1 and self._buckets[0].whole:
            return self._attend_bucket(self._buckets[0], layer, q, scaling, window, softcap)
        out = torch.empty_like(q)
        for bucket in self._buckets:
            part = q.index_select(0, bucket.inputs)
            result = self._attend_bucket(bucket, layer, part, scaling, window, softcap)
            out.index_copy_(0, bucket.inputs, result)
        return out

    def _attend_bucket(
        self,
        bucket: Bucket,
        layer: int,
        q: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """q [B * N, heads, head_dim] -> the same shape."""
        b, n, s = bucket.segments, bucket.width, bucket.length
        heads, dim = q.shape[1:]
        kv_heads = self._pool.layers[layer].kv_heads
        group = heads // kv_heads
        keys, values = self._gather(bucket, layer)  # [B * kv_heads, S, dim]
        if n == 1:
            rows = q.reshape(b * kv_heads, group, dim)
        else:
            rows = (
                q.view(b, n, kv_heads, group, dim)
                .transpose(1, 2)
                .reshape(b * kv_heads, n * group, dim)
            )
        scores = torch.baddbmm(q.new_empty(()), rows, keys.transpose(1, 2), beta=0, alpha=scaling)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        bias, nothing = bucket.bias(window, q.dtype)
        if bias is not None:
            scores.view(b, kv_heads, n, group, s).add_(bias)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        result = torch.bmm(weights, values).view(b, kv_heads, n, group, dim)
        if nothing is not None:
            result = result.masked_fill(nothing, 0)
        return result.transpose(1, 2).reshape(b * n, heads, dim)

    def _gather(self, bucket: Bucket, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        kv = self._pool.kv[layer]
        kv_heads, dim = kv.shape[3:]
        if bucket.run is not None:  # one segment whose slots lie side by side: no copy
            flat = kv.flatten(1, 2)[:, bucket.run : bucket.run + bucket.length].transpose(1, 2)
            return flat[0], flat[1]
        rows = bucket.head_rows(kv_heads)
        shape = (bucket.segments * kv_heads, bucket.length, dim)
        keys = kv[0].view(-1, dim).index_select(0, rows).view(shape)
        values = kv[1].view(-1, dim).index_select(0, rows).view(shape)
        return keys, values
