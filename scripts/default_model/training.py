"""The model and its training loop: Muon for the matrices, AdamW for embeddings and norms."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from default_model.corpus import draw_windows
from default_model.documents import END_OF_TEXT, TURN_END

VOCABULARY = 2048
CONTEXT = 2048


@dataclass(frozen=True)
class Cycle:
    """A ramp of the learning rate up to its peak, a plateau, and a straight line down to 2 %.

    From step `long_from` of the cycle, every `long_every`th step has windows of `CONTEXT` tokens.
    """

    steps: int
    peak_rate: float
    warmup: int
    decay: int
    long_from: int
    long_every: int

    def rate(self, step: int) -> float:
        left = (self.steps - step) / self.decay
        return self.peak_rate * min(1.0, (step + 1) / self.warmup, max(0.02, left))

    def is_long(self, step: int) -> bool:
        return step >= self.long_from and step % self.long_every == 0


@dataclass(frozen=True)
class Plan:
    """A training run; lengths in tokens.

    The first cycle learns, and meets long windows at its end; the second, lower one mixes long
    and short windows, because after the long ones alone the worked sums were worse; the third
    settles the lists. What each is told: `corpus.MIXTURES`.
    """

    seed: int = 0
    rows: int = 8
    window: int = 512
    cycles: tuple[Cycle, ...] = (
        Cycle(2000, peak_rate=4e-3, warmup=60, decay=800, long_from=1900, long_every=1),
        Cycle(1000, peak_rate=2.5e-3, warmup=50, decay=950, long_from=0, long_every=6),
        Cycle(400, peak_rate=1.5e-3, warmup=30, decay=370, long_from=0, long_every=6),
    )

    @property
    def steps(self) -> int:
        return sum(cycle.steps for cycle in self.cycles)

    @property
    def tokens_a_step(self) -> int:
        return self.rows * self.window

    def at(self, step: int) -> tuple[float, bool]:
        """The learning rate of a step, and whether its windows are long."""
        for cycle in self.cycles:
            if step < cycle.steps:
                return cycle.rate(step), cycle.is_long(step)
            step -= cycle.steps
        raise IndexError(f"step {step} is after the last cycle")


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh model of about five million parameters."""
    stops: Any = tokenizer.convert_tokens_to_ids([END_OF_TEXT, TURN_END])
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=stops[0],
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(inner, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def loss_of(model: Any, inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean cross-entropy, in nats a token; all tensors [rows, length]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=inputs, use_cache=False).logits
    losses = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def train(
    plan: Plan,
    tokenizer: PreTrainedTokenizerFast,
    checkpoint: Path,
    milestone: Callable[[LlamaForCausalLM, int, float], None],
    every: int = 300,
) -> tuple[LlamaForCausalLM, float]:
    """Run or resume the plan; returns the model and the seconds of training.

    checkpoint: a file written every `every` steps, and read first when it exists.
    milestone: called with the model, the step and the seconds so far after each checkpoint.
    """
    torch.manual_seed(plan.seed)
    model = new_model(tokenizer)
    tuners = optimizers(model)
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        if state["plan"] != asdict(plan):
            raise SystemExit(f"{checkpoint} is of another plan: {state['plan']}; remove it")
        model.load_state_dict(state["model"])
        for tuner, saved in zip(tuners, state["tuners"], strict=True):
            tuner.load_state_dict(saved)
        first, seconds = state["step"], state["seconds"]
    compiled = torch.compile(model, dynamic=False)
    backend = tokenizer.backend_tokenizer
    began, mean_loss = time.monotonic() - seconds, math.nan
    for step in range(first, plan.steps):
        rate, long = plan.at(step)
        rows, length = (
            (plan.tokens_a_step // CONTEXT, CONTEXT) if long else (plan.rows, plan.window)
        )
        batch = draw_windows(backend, plan.seed, step, rows, length)
        loss: Any = loss_of(model if long else compiled, *batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for tuner in tuners:
            for group in tuner.param_groups:
                group["lr"] = rate
            tuner.step()
            tuner.zero_grad()
        value = loss.item()
        mean_loss = value if math.isnan(mean_loss) else 0.95 * mean_loss + 0.05 * value
        seconds = time.monotonic() - began
        done = step + 1
        if done % 50 == 0:
            print(f"step {done} loss {mean_loss:.4f} seconds {seconds:.0f}", flush=True)
        if done % every == 0 or done == plan.steps:
            torch.save(
                {
                    "plan": asdict(plan),
                    "model": model.state_dict(),
                    "tuners": [tuner.state_dict() for tuner in tuners],
                    "step": done,
                    "seconds": seconds,
                },
                checkpoint,
            )
            milestone(model, done, seconds)
            began = time.monotonic() - seconds  # milestones are not training time
    return model, seconds
