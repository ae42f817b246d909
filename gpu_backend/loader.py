"""Loads a checkpoint through transformers with our paged attention, or refuses it with a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from .architecture import check_config, context_limit, layer_shapes
from .checkpoint import find_checkpoint
from .engine import IMPLEMENTATION
from .errors import LoadError
from .kv_pool import LayerShape
from .vocabulary import Vocabulary, load_vocabulary

DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Below this, float32 and one thread are the fastest on a CPU.
SMALL_MODEL: Final = 50_000_000
OnProgress = Callable[[str, float], None]

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # what matters becomes a LoadError


@dataclass(slots=True)
class LoadedModel:
    """A model ready for paged steps."""

    name: str
    model: Any  # transformers' CausalLM, in eval mode, on the device
    head: Any  # the same without its layers: hidden states to logits
    layers: list[LayerShape]
    vocabulary: Vocabulary
    vocab_size: int
    hidden_size: int
    max_context: int
    bos_token: int | None
    eos_tokens: list[int]
    dtype: torch.dtype
    device: torch.device

    @property
    def architecture(self) -> str:
        return type(self.model).__name__

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The embeddings [T, hidden_size] of tokens i64 [T], as the model's layers take them."""
        embeddings: torch.Tensor = self.model.get_input_embeddings()(tokens)
        return embeddings

    def hidden_states(self, inputs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Final hidden states [T, hidden_size] of inputs (tokens i64 [T], or vectors
        [T, hidden_size] in place of their embeddings) at positions i64 [T]. Runs inside
        `engine.attending_with`."""
        name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        output = self.model.base_model(
            **{name: inputs[None]}, position_ids=positions[None], use_cache=False
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """f32 [K, vocab_size] of hidden states [K, hidden_size], by the architecture's own head
        and what it does after it (soft-capping, scaling)."""
        logits: torch.Tensor = self.head(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits.float()


class _PassThrough(torch.nn.Module):
    """In the place of a model's layers: what goes in are hidden states already."""

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


def _head_of(model: Any) -> Any:
    """A shallow copy of a CausalLM that shares its head and has no layers."""
    head = copy.copy(model)
    head._modules = {**model._modules, model.base_model_prefix: _PassThrough()}
    return head


def load_model(
    model: str,
    *,
    device: torch.device,
    dtype: str = "auto",
    max_context: int | None = None,
    progress: OnProgress = lambda stage, fraction: None,
) -> LoadedModel:
    """Loads "default", a folder or a hub id. LoadError says why not."""
    progress("finding the checkpoint", 0.0)
    folder = find_checkpoint(model)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # KeyError, ValueError, TypeError: whatever the file made of it
        raise LoadError(
            f"the config of {model} is not understood: {_first_line(error)}",
            "use a model that transformers itself supports (custom code is never run)",
        ) from error
    check_config(config, model)
    text = config.get_text_config()
    progress("reading the tokenizer", 0.05)
    vocabulary = load_vocabulary(folder, text.vocab_size)
    progress("loading weights", 0.1)
    kind = choose_dtype(dtype, folder, config, device)
    network = _to_device(_load_weights(folder, model, kind), model, device).eval()
    progress("checking the architecture", 0.8)
    network.set_attn_implementation(IMPLEMENTATION)
    generation = network.generation_config
    eos = generation.eos_token_id if generation is not None else None
    if eos is None:
        eos = text.eos_token_id if text.eos_token_id is not None else vocabulary.eos_token
    limit = context_limit(config)
    return LoadedModel(
        name=Path(model).resolve().name if Path(model).is_dir() else model,
        model=network,
        head=_head_of(network),
        layers=layer_shapes(network, model),
        vocabulary=vocabulary,
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        max_context=min(limit, max_context or limit),
        bos_token=vocabulary.bos_token if vocabulary.bos_token is not None else text.bos_token_id,
        eos_tokens=[eos] if isinstance(eos, int) else list(eos or ()),
        dtype=kind,
        device=device,
    )


def choose_dtype(dtype: str, folder: Path, config: Any, device: torch.device) -> torch.dtype:
    """What "auto" means: on CUDA the checkpoint's own dtype. On the CPU float32 for small models
    (measured: faster at batch 1, even at 32) and for what is stored so, else bfloat16 (twice as
    fast; float16 has no fast kernels there)."""
    if dtype != "auto":
        return DTYPES[dtype]
    stored = config.get_text_config().dtype or config.dtype or torch.float32
    if device.type == "cuda":
        return cast(torch.dtype, stored)
    small = stored_parameters(folder, stored) < SMALL_MODEL
    return torch.float32 if small or stored == torch.float32 else torch.bfloat16


def stored_parameters(folder: Path, dtype: torch.dtype) -> int:
    """About how many parameters the checkpoint holds."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) // dtype.itemsize


def _load_weights(folder: Path, model: str, dtype: torch.dtype) -> Any:
    try:
        network, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise LoadError(
            f"the weights of {model} are damaged: {_first_line(error)}",
            "download the checkpoint again",
        ) from error
    except Exception as error:  # from a missing quantization package to a wrong shape
        raise LoadError(
            f"the weights of {model} cannot be loaded: {_first_line(error)}",
            "check that the folder holds every *.safetensors file of an unquantized checkpoint",
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would leave them random
        raise LoadError(
            f"the weights of {model} are incomplete: {len(missing)} tensors are missing, "
            f"{missing[0]} first",
            "download the checkpoint again",
        )
    return network


def _to_device(network: Any, model: str, device: torch.device) -> Any:
    try:
        return network.to(device)
    except RuntimeError as error:  # torch's out-of-memory error is one
        raise LoadError(
            f"the weights of {model} do not fit on {device}: {_first_line(error)}",
            "use a smaller model or --device cpu, or free the device's memory",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
