"""Scores: exact match by greedy decoding, on all taught facts and on held-out problems.

A problem is answered when the model writes every taught segment of its document token for token,
each after the text before it: in a ReAct trace each thought and action given the question and the
observations so far, then the final answer; in a chat each reply. Only an enumeration ("List three
fruits:") is free: it must have the form, the count and distinct members of the category.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from default_model import facts, lists
from default_model.corpus import DRAWS
from default_model.documents import END_OF_TEXT, Document, draw_held_out

PROBLEMS = 200  # a kind; all facts
EVALUATION_SEED = 1_000_003
BATCH = 64


@dataclass(frozen=True)
class Ask:
    """One generation: `problem` is its document's place in the list of problems."""

    problem: int
    prompt: str
    expected: str
    prompt_ids: list[int]
    expected_ids: list[int]


def problems(kind: str, count: int = PROBLEMS) -> list[Document]:
    """The test problems of a kind: every fact, else up to `count` held-out problems."""
    if kind == "facts":
        return [facts.problem(fact) for fact in facts.FACTS]
    return draw_held_out(DRAWS[kind], random.Random(f"{EVALUATION_SEED} {kind}"), count)


def asks(tokenizer: PreTrainedTokenizerFast, chosen: list[Document]) -> list[Ask]:
    """One generation for each taught segment of each problem."""
    result = []
    for place, document in enumerate(chosen):
        before = ""
        for segment in document.segments:
            if segment.taught:
                prompt_ids, expected_ids = (
                    tokenizer.encode(text, add_special_tokens=False)
                    for text in (before, segment.text)
                )
                result.append(Ask(place, before, segment.text, prompt_ids, expected_ids))
            before += segment.text
    return result


def generate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch: list[Ask]
) -> list[list[int]]:
    """Greedy continuations as long as the batch's longest expected text, in tokens."""
    padded = tokenizer.pad({"input_ids": [ask.prompt_ids for ask in batch]}, return_tensors="pt")
    width = padded["input_ids"].shape[1]
    untyped: Any = model
    with torch.inference_mode():
        output = untyped.generate(
            **padded,
            do_sample=False,
            max_new_tokens=max(len(ask.expected_ids) for ask in batch),
            pad_token_id=tokenizer.pad_token_id,
        )
    return [row[width:].tolist() for row in output]


def is_right(tokenizer: PreTrainedTokenizerFast, ask: Ask, ids: list[int]) -> bool:
    text = str(tokenizer.decode(ids)).split(END_OF_TEXT)[0]
    enumerates = lists.is_enumeration(ask.prompt, text)
    if enumerates is not None:
        return enumerates
    return ids[: len(ask.expected_ids)] == ask.expected_ids


def score(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, chosen: list[Document]
) -> tuple[float, list[tuple[str, str, str]]]:
    """The share of problems answered, and (prompt, expected, written) of the failed generations."""
    todo = sorted(
        asks(tokenizer, chosen), key=lambda ask: (len(ask.expected_ids), len(ask.prompt_ids))
    )
    failed: set[int] = set()
    failures = []
    for first in range(0, len(todo), BATCH):
        batch = todo[first : first + BATCH]
        for ask, ids in zip(batch, generate(model, tokenizer, batch), strict=True):
            if not is_right(tokenizer, ask, ids):
                failed.add(ask.problem)
                failures.append((ask.prompt, ask.expected, str(tokenizer.decode(ids))))
    return 1 - len(failed) / len(chosen), failures


def score_all(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int = PROBLEMS
) -> dict[str, dict[str, float]]:
    """For each kind the share of problems answered and how many there were."""
    result = {}
    for kind in DRAWS:
        chosen = problems(kind, count)
        share, _ = score(model, tokenizer, chosen)
        result[kind] = {"exact_match": round(share, 4), "problems": len(chosen)}
    return result
