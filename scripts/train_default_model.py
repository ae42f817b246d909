"""Train, score and write the embedded default model, from nothing but this repository.

It writes the folder a launch without a model name loads: config, bf16 weights, tokenizer, card and
scores. Runs on a CPU; a stopped run resumes from its checkpoint. The shipped model took 3,400 steps
and 74 minutes on two cores of a busy server with bfloat16 instructions (1 second a step when idle).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from default_model.card import write_card
from default_model.corpus import training_text
from default_model.evaluate import score_all
from default_model.export import load, publish
from default_model.tokenizer import train_tokenizer
from default_model.training import CONTEXT, VOCABULARY, Plan, train
from transformers import LlamaForCausalLM

REPOSITORY = Path(__file__).resolve().parent.parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "gpu_backend" / "default_model")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path(tempfile.gettempdir()) / "piehost_default_model.pt",
        help="written as training goes on, and resumed from when it exists",
    )
    return parser.parse_args()


def main() -> None:
    options = arguments()
    plan = Plan(seed=options.seed)
    tokenizer = train_tokenizer(training_text(plan.seed, 40_000), VOCABULARY, CONTEXT)

    def milestone(model: LlamaForCausalLM, step: int, seconds: float) -> None:
        publish(model, tokenizer, options.out)
        print(f"step {step}", score_all(*load(options.out), count=40), flush=True)

    model, seconds = train(plan, tokenizer, options.checkpoint, milestone)
    publish(model, tokenizer, options.out)
    scores = score_all(*load(options.out))
    write_card(options.out, plan, model, scores, seconds)
    print(scores)


if __name__ == "__main__":
    main()
