"""What this backend can serve, judged from a config and from one dry run of the model.

transformers' models differ in more than names. What is checked here is what the paged path
relies on; the self-check in `loader.py` then compares numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM

from .batch import AttentionBatch
from .engine import UnsupportedAttention, attending_with
from .errors import LoadError
from .kv_pool import LayerShape

_TRY_ANOTHER: Final = "use a decoder-only model such as Llama, Qwen, Mistral, Gemma or Phi-3"
_LAYER_TYPES: Final = {"full_attention", "sliding_attention"}
_ROPE_TYPES: Final = {"default", "linear", "llama3", "yarn", "proportional", "dynamic", "longrope"}


def refuse(model: str, why: str) -> LoadError:
    return LoadError(f"the model {model} cannot be served: {why}", _TRY_ANOTHER)


def check_config(config: Any, model: str) -> None:
    """LoadError if the config is of a model that is no causal text decoder with paged attention."""
    if config.is_encoder_decoder:
        raise refuse(model, "it is an encoder-decoder, and piehost serves decoders only")
    mapping = AutoModelForCausalLM._model_mapping
    served = mapping.get(type(config), None)
    named = (getattr(config, "architectures", None) or [None])[0]
    if served is None or (named is not None and named != served.__name__):
        raise refuse(model, f"{named or config.model_type} is not a model that generates text")
    if getattr(served, "_is_stateful", False):
        raise refuse(
            model, "its layers keep a running state (state-space or linear attention), not KV pages"
        )
    if not getattr(served, "_supports_attention_backend", False):
        raise refuse(model, f"transformers' {served.__name__} computes attention in its own way")
    text = config.get_text_config()
    if not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", False):
        raise refuse(model, "its attention is not causal")
    odd = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
    if odd:
        raise refuse(model, f"it has layers of type {', '.join(sorted(odd))}")
    if getattr(text, "kv_lora_rank", None):
        raise refuse(model, "its attention keeps a compressed latent (MLA) instead of heads")
    for rope in _ropes(text):
        if rope.get("rope_type", "default") not in _ROPE_TYPES:
            raise refuse(model, f"rotary embeddings of type {rope['rope_type']!r} are not known")


def context_limit(config: Any) -> int:
    """How many positions the model computes exactly, whatever else is in the batch.

    "dynamic" and "longrope" change every frequency once a position passes a limit, for all
    sequences of a batch at once; below it they are fixed. So the limit is where we stop.
    """
    text = config.get_text_config()
    limit = int(getattr(text, "max_position_embeddings", None) or 2048)
    for rope in _ropes(text):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            limit = min(limit, int(original or limit))
    return limit


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Rotary settings: one dict, or one a layer type."""
    settings = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return nested or [settings]


@dataclass(slots=True)
class _DryRun:
    """An attention engine that computes nothing and notes what each layer asks for."""

    name: str = "dry run"
    keys: dict[int, tuple[int, ...]] = field(default_factory=dict)
    shapes: dict[int, LayerShape] = field(default_factory=dict)
    windows: dict[int, int | None] = field(default_factory=dict)

    def plan(self, batch: AttentionBatch) -> None: ...

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        if layer in self.keys:
            raise UnsupportedAttention(f"layer {layer} attends more than once")
        if k.shape != v.shape:
            raise UnsupportedAttention("keys and values differ in shape")
        self.keys[layer] = tuple(k.shape)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        _, kv_heads, dim = self.keys[layer]
        if q.shape[2] != dim:
            raise UnsupportedAttention("queries and keys differ in shape")
        self.shapes[layer] = LayerShape(q.shape[1], kv_heads, dim)
        self.windows[layer] = window
        return torch.zeros_like(q)


def layer_shapes(model: Any, name: str) -> list[LayerShape]:
    """What each attention layer of a loaded model keeps a slot. LoadError if its layers are not
    the plain attention layers that its config speaks of."""
    config = model.config.get_text_config()
    dry = _DryRun()
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    positions = torch.arange(2, device=model.device)[None]
    try:
        with torch.inference_mode(), attending_with(dry):
            model(input_ids=ids, position_ids=positions, use_cache=False)
    except UnsupportedAttention as error:
        raise refuse(name, str(error)) from error
    except Exception as error:  # models' own code: a batch of one ragged row is not for all of them
        raise refuse(name, f"it does not run on a ragged batch ({type(error).__name__})") from error
    count = config.num_hidden_layers
    if sorted(dry.shapes) != list(range(count)):
        raise refuse(name, f"only {len(dry.shapes)} of its {count} layers are attention layers")
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    expected = [window if t == "sliding_attention" else None for t in types or ()]
    found = [dry.windows[i] for i in range(count)]
    if (expected and found != expected) or (not types and window and not any(found)):
        raise refuse(name, f"its layers do not say which of them use the window of {window}")
    return [dry.shapes[i] for i in range(count)]
