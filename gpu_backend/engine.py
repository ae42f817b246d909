"""What an attention engine is, and how transformers' models come to call it.

A model is loaded with `attn_implementation="piehost"`. Each of its attention layers then calls
`paged_attention`, which stores the new keys and values in the pool and asks the engine at work.
No mask function is registered under that name, so transformers builds no masks at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final, Protocol

import torch
from transformers import AttentionInterface

from .batch import AttentionBatch

IMPLEMENTATION: Final = "piehost"

# Arguments that transformers passes to every attention function and that change nothing here:
# dropout is 0 in inference, positions are in the step, the rest selects outputs we do not return.
_HARMLESS: Final = {
    "dropout",
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "layer_idx",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
}


class UnsupportedAttention(Exception):
    """A layer asks for attention that the engines do not compute; the message says what."""


class AttentionEngine(Protocol):
    """Attention of one ragged batch over the KV pool."""

    @property
    def name(self) -> str: ...

    def plan(self, batch: AttentionBatch) -> None:
        """Prepares the index tensors of a step; every layer's call reuses them.

        Called after the step's positions and visible bits are in the pool.
        """

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores the step's k and v [T, kv_heads, head_dim]."""

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """q [T, heads, head_dim] -> [T, heads, head_dim]. A query with nothing to attend to
        gives zeros. `window`: keys at positions <= p - window are left out."""


_engine: AttentionEngine | None = None


@contextlib.contextmanager
def attending_with(engine: AttentionEngine) -> Iterator[None]:
    """Forward passes inside use `engine` (one at a time: a backend has one compute thread)."""
    global _engine
    _engine = engine
    try:
        yield
    finally:
        _engine = None


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """The function transformers' attention layers call: query [1, heads, T, head_dim], key and
    value [1, kv_heads, T, head_dim] -> [1, T, heads, head_dim].

    UnsupportedAttention for anything that would change the result and that no engine computes.
    """
    if _engine is None:
        raise RuntimeError("paged attention was called outside a step")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise UnsupportedAttention("its attention is not causal")
    if attention_mask is not None:
        raise UnsupportedAttention("it builds an attention mask of its own")
    unknown = {name for name, value in other.items() if value is not None and value is not False}
    if unknown - _HARMLESS:
        raise UnsupportedAttention(f"its attention takes {', '.join(sorted(unknown - _HARMLESS))}")
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise UnsupportedAttention("its attention layers are not numbered")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    _engine.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    out = _engine.attend(layer, query[0].transpose(0, 1), scaling, sliding_window, softcap)
    return out.unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, paged_attention)
