"""Small random checkpoints on disk, seeded: real safetensors folders with a real tokenizer.

Weights are large enough that greedy output wanders and its logit gaps stand far above rounding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 384  # larger than the tokenizer's, as in many real models

_SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "mistral": {"model_type": "mistral", "sliding_window": 24},
    "gemma2": {
        "model_type": "gemma2",
        "tie_word_embeddings": False,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 10.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "tie_word_embeddings": False,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 16,
    },
    "phi3": {"model_type": "phi3", "sliding_window": 40},
}

_TEXT = (
    "The capital of France is Paris. The capital of Italy is Rome. 17 + 25 = 42. "
    'def add(a, b): return a + b. {"name": "Ada", "age": 36}. Rivers run to the sea. '
)


def make_checkpoint(
    folder: Path, architecture: str = "llama", seed: int = 0, **changes: Any
) -> Path:
    """Writes a checkpoint of one of `ARCHITECTURES` into `folder`, `changes` in its config."""
    settings = {**_SMALL, **ARCHITECTURES[architecture], **changes}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE with control tokens <bos> 0, <eos> 1, <pad> 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return _fast(tokenizer)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama-2 and Mistral have: U+2581 for a space, <0x00> .. <0xFF> for single octets."""
    words = ["\u2581the", "\u2581capital", "of", "\u2581", "France", "\u00e9"]
    pieces = ["<bos>", "<eos>", "<pad>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _fast(tokenizer)


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def edit_config(folder: Path, **changes: Any) -> None:
    """Rewrites keys of a checkpoint's config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
