"""The last guard at load: our paged path must give what the model's own eager attention gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import torch

from piehost.wire.step import Step, StepDone

from .engine import IMPLEMENTATION
from .errors import LoadError
from .kv_pool import KvPool
from .loader import LoadedModel

_TOKENS: Final = 37  # crosses pages of every size
# Largest difference of a logit, in standard deviations of the logits.
_TOLERANCE: Final = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}


def self_check(loaded: LoadedModel, pool: KvPool, run: Callable[[Step], StepDone]) -> None:
    """Runs a short random prompt in two chunks and two decodes, one of them with listed slots.

    LoadError if a step fails or the logits differ from the reference by more than rounding.
    """
    count = min(_TOKENS, loaded.max_context, pool.pages * pool.page_size)
    if count < 4:
        raise LoadError(
            f"room for {count} tokens is too little to check the model", "give more --kv-pages"
        )
    tokens = np.random.default_rng(0).integers(0, loaded.vocab_size, count).astype(np.int32)
    ends = [count // 2, count - 2, count - 1, count]
    for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        done = run(_step(number, tokens, start, end, pool.page_size))
        if done.error is not None:
            raise LoadError(
                f"the model {loaded.name} cannot be served: its first steps fail ({done.error})",
                "use a decoder-only model such as Llama, Qwen, Mistral, Gemma or Phi-3",
            )
    with torch.inference_mode():
        pool.forget(torch.arange(count, device=pool.device))
        ours = loaded.logits(pool.rows[:count])
        reference = _reference(loaded, tokens)
        difference = ((ours - reference).abs().max() / reference.std()).item()
    if not difference <= _TOLERANCE[loaded.dtype]:
        raise LoadError(
            f"the model {loaded.name} cannot be served: with paged attention its logits are off by "
            f"{difference:.2g} standard deviations from transformers' own",
            "its attention does something that is not supported here; use another architecture",
        )


def takes_vectors(loaded: LoadedModel) -> bool:
    """Whether the model computes the same from its tokens' embeddings as from the tokens: some
    look at the token ids again further in."""
    ids = torch.arange(min(_TOKENS, loaded.vocab_size), device=loaded.device)[None]
    loaded.model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            expected = loaded.model(input_ids=ids, use_cache=False).logits
            vectors = loaded.embed(ids[0])[None]
            logits = loaded.model(inputs_embeds=vectors, use_cache=False).logits
    except (ValueError, RuntimeError, TypeError, AttributeError):  # it wants the tokens
        return False
    finally:
        loaded.model.set_attn_implementation(IMPLEMENTATION)
    return bool(torch.equal(logits, expected))


def _reference(loaded: LoadedModel, tokens: np.ndarray) -> torch.Tensor:
    ids = torch.from_numpy(tokens).to(loaded.device, torch.int64)[None]
    loaded.model.set_attn_implementation("eager")
    try:
        logits: torch.Tensor = loaded.model(input_ids=ids, use_cache=False).logits[0]
    finally:
        loaded.model.set_attn_implementation(IMPLEMENTATION)
    return logits.float()


def _step(number: int, tokens: np.ndarray, start: int, end: int, page_size: int) -> Step:
    """Tokens start .. end - 1 of one sequence that lies in the first pages; row i keeps token i."""
    span = np.arange(start, end, dtype=np.int32)
    inputs = np.int32(end - start).tobytes()
    kv = np.int32(end).tobytes()
    step = Step(
        number,
        tokens=tokens[start:end].tobytes(),
        positions=span.tobytes(),
        write_slots=span.tobytes(),
        keep_inputs=(span - start).tobytes(),
        keep_rows=span.tobytes(),
    )
    if end == len(tokens):
        step.listed_inputs, step.listed_kv = inputs, kv
        step.listed_slots = np.arange(end, dtype=np.int32).tobytes()
        step.listed_masks = [None]
    else:
        step.paged_inputs, step.paged_kv = inputs, kv
        step.paged_pages = np.arange(-(-end // page_size), dtype=np.int32).tobytes()
    return step
