"""Writing and loading the model folder. Files are renamed into place, never half there."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


def publish(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write config, generation config, bf16 weights and tokenizer into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as name:
        fresh = Path(name)
        copy: Any = LlamaForCausalLM(model.config)
        copy.load_state_dict(model.state_dict())
        copy = copy.to(torch.bfloat16)
        generation: Any = GenerationConfig
        copy.generation_config = generation(
            bos_token_id=model.config.bos_token_id,
            eos_token_id=model.config.eos_token_id,
            pad_token_id=model.config.pad_token_id,
            do_sample=False,
        )
        copy.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh, save_jinja_files=False)
        for file in sorted(fresh.iterdir()):
            place(file, folder)


def write_text(folder: Path, name: str, text: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as fresh:
        file = Path(fresh) / name
        file.write_text(text)
        place(file, folder)


def place(file: Path, folder: Path) -> None:
    file.chmod(0o644)
    file.replace(folder / file.name)


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The folder's model in float32 and its tokenizer, as the tests and the scores use them."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return model.eval(), tokenizer
