"""The model card and scores.json. Every example in the card is a problem the tests run."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import LlamaForCausalLM

from default_model.documents import END_OF_TEXT, TURN_END, Document, given, question, taught
from default_model.export import write_text
from default_model.facts import FACTS
from default_model.knowledge import MEMBERS
from default_model.training import Plan

_CALL = '{"name": "calculator", "arguments": {"expression": "47 + 38"}}'

EXAMPLES: list[tuple[str, Document]] = [
    (
        "A fact, told",
        Document("facts", (given("The capital of France is"), taught(" Paris."))),
    ),
    (
        "A fact, asked",
        question("facts", "Q: What is the opposite of hot?\nA:", " Cold"),
    ),
    (
        "A sum worked in columns from the right; a product by one digit looks the same",
        question(
            "arithmetic",
            "Q: 47 + 38 = ?",
            "\n7 + 8 = 15, write 5, carry 1\n4 + 3 + 1 = 8, write 8, carry 0\nAnswer: 85",
        ),
    ),
    (
        "A difference worked in columns",
        question(
            "arithmetic",
            "Q: 52 - 37 = ?",
            "\n12 - 7 = 5, write 5, borrow 1\n5 - 3 - 1 = 1, write 1, borrow 0\nAnswer: 15",
        ),
    ),
    (
        "A chain, one step a line",
        question("arithmetic", "Q: 12 + 7 - 5 = ?", "\n12 + 7 = 19\n19 - 5 = 14\nAnswer: 14"),
    ),
    ("A bare result", question("arithmetic", "47 + 38 =", " 85")),
    (
        "A ReAct trace; stop at `Observation:`, append a space, the tool's answer and a newline",
        Document(
            "react",
            (
                given("Question: How old will Anna be in 12 years?"),
                taught(
                    "\nThought: I need to search for the age of Anna."
                    "\nAction: search[age of Anna]\nObservation:"
                ),
                given(" Anna is 31 years old.\n"),
                taught(
                    "Thought: I need to calculate 31 + 12."
                    "\nAction: calculator[31 + 12]\nObservation:"
                ),
                given(" 43\n"),
                taught(f"Thought: The result is 43.\nFinal Answer: 43{END_OF_TEXT}"),
            ),
        ),
    ),
    (
        "A ReAct lookup",
        Document(
            "react",
            (
                given("Question: What is the capital of France?"),
                taught(
                    "\nThought: I need to look up the capital of France."
                    "\nAction: lookup[capital of France]\nObservation:"
                ),
                given(" Paris\n"),
                taught(f"Thought: The lookup says Paris.\nFinal Answer: Paris{END_OF_TEXT}"),
            ),
        ),
    ),
    (
        "A Python expression",
        question("python", ">>> [x * 2 for x in [1, 2, 3]]", "\n[2, 4, 6]"),
    ),
    (
        "A code action; stop at `Output:`, then append a space, the printed text and a newline",
        Document(
            "python",
            (
                given("Task: Add 12, 7 and 5."),
                taught("\nCode: print(12 + 7 + 5)\nOutput:"),
                given(" 24\n"),
                taught(f"Answer: 24{END_OF_TEXT}"),
            ),
        ),
    ),
    (
        "A sentence as JSON",
        question(
            "json",
            "Text: Anna is 31 years old and lives in Oslo.\nJSON:",
            ' {"name": "Anna", "age": 31, "city": "Oslo"}',
        ),
    ),
    (
        "A sentence as JSON with chosen keys",
        question(
            "json",
            "Text: Anna is 31 years old and lives in Oslo.\nKeys: city, name\nJSON:",
            ' {"city": "Oslo", "name": "Anna"}',
        ),
    ),
    (
        "A tool call: calculator (expression), lookup and search (query), weather (city)",
        question("json", "Request: What is 47 + 38?\nCall:", f" {_CALL}"),
    ),
    (
        "A numbered list; `List three fruits with dashes:` gives dashes. Members vary",
        question("lists", "List three fruits:", "\n1. pear\n2. apple\n3. mango"),
    ),
    (
        "An outline",
        question(
            "lists",
            "Topic: cats\nOutline:",
            "\n1. Where cats live\n2. What cats eat\n3. How young cats are called",
        ),
    ),
    (
        "A point of an outline",
        question(
            "lists",
            "Topic: cats\nPoint: What cats eat\nDetail:",
            " Cats eat fish and meat.",
        ),
    ),
    (
        "A question split into parts (capitals, languages or populations)",
        question(
            "lists",
            "Question: What are the capitals of France and Japan?\nParts:",
            "\n1. What is the capital of France?\n2. What is the capital of Japan?",
        ),
    ),
    (
        "Chat",
        Document(
            "chat",
            (
                given(
                    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
                    "<|im_start|>assistant\n"
                ),
                taught(f"The capital of France is Paris.{TURN_END}"),
            ),
        ),
    ),
    (
        "Chat with tools: the system turn ends with a line `Tools: ` and their names",
        Document(
            "chat",
            (
                given(
                    "<|im_start|>system\nTools: calculator, lookup<|im_end|>\n"
                    "<|im_start|>user\nWhat is 47 + 38?<|im_end|>\n<|im_start|>assistant\n"
                ),
                taught(f"{_CALL}{TURN_END}"),
                given("\n<|im_start|>tool\n85<|im_end|>\n<|im_start|>assistant\n"),
                taught(f"47 + 38 = 85{TURN_END}"),
            ),
        ),
    ),
]

_CARD = """\
---
license: apache-2.0
language: en
---

# The embedded default model

A Llama-architecture language model of {parameters:,} parameters, made so that piehost gives
sensible output before any model is downloaded, and so that its tests and examples run anywhere.
It is a model for development: it knows what the tables in `scripts/default_model/` say, and
nothing else.

## How it was made

`python scripts/train_default_model.py --seed {seed}` wrote everything in this folder: its text is
drawn from a seed, nothing is downloaded, no other model is involved. It saw {tokens:,} tokens in
{minutes:.0f} minutes on two cores of a busy x86 server with bfloat16 instructions: {steps} steps
with windows of {window} tokens, or of {context} tokens in {long} of them. {layers} layers of width
{width}, {heads} query and {kv_heads} key-value heads of 64; a byte-level BPE of {vocabulary} tokens
in which each digit and each newline is its own token. Muon for matrices, AdamW for the rest, peak
learning rate {rate}, then two cycles at lower rates.

The schedule was settled while training: the run was stopped and resumed four times, the mixtures
and cycles after each stop being chosen by the scores so far. The command replays the whole schedule
from the start; it has not been run from the start in one go, and floating-point sums differ between
machines, so expect like scores, not the same bytes. The held-out problems below were those watched.

## Scores

Exact match by greedy decoding in float32. Facts: every taught fact, as a sentence to complete.
The others: problems of the taught kinds that no training document contains (one problem in ten
is held out by a hash; 47 + 38 and 38 + 47 are one problem, in every kind of text). Everything the
model has to write must match token for token: all steps, all thoughts and actions, every reply;
only a list's members are free. `tests/test_default_model.py` computes the table again.

| kind | problems | exact match |
|---|---:|---:|
{rows}

## What it can do

- complete or answer the taught facts: {facts} sentences on countries, animals, opposites, colors,
  elements, numbers, days, months and planets;
- add and subtract up to three digits with steps and up to two digits at once; multiply up to
  three digits by one digit with steps; follow chains of three or four small numbers;
- call tools in ReAct traces, in JSON and in chat, and answer from what the tool said, even when
  it contradicts a fact;
- turn sentences of eight forms into JSON, list members of {categories} categories, split
  questions, evaluate short Python expressions;
- stop: every text ends with `<|endoftext|>`, every reply with `<|im_end|>`.

## What it cannot do

Even in its own forms it errs: "Count from 36 to 39:" mostly runs past its end (all but one of the
lists it fails), Python's `==`, `in`, `<` and `>` are guesses, and a rare name is at times copied
with a syllable wrong. Constrain or check what matters.

Anything else it cannot do at all. It has never seen text outside this repository: other wordings,
other languages, other tools or other facts give confident nonsense. Longer numbers than taught
fail. Its facts are a schoolbook's, one answer each (one language a country, one food an animal).
It was trained on windows of up to {context} tokens of unrelated short documents, so a long prompt
does not break it, but it has learned little use of distant text. It has no safety training and
needs none for what it knows; do not put it in front of people as an assistant.

## Prompt formats

Text in exactly these forms works; the strings are Python literals. No token is put before a
prompt. In chat use the tokenizer's chat template (roles system, user, assistant, tool).

{examples}
"""


def _example(title: str, document: Document) -> str:
    lines = [f"{title}:", "", "```python"]
    for segment in document.segments:
        lines.append(f"{'model ' if segment.taught else 'prompt'} = {segment.text!r}")
    return "\n".join([*lines, "```"])


def table(scores: dict[str, dict[str, float]]) -> str:
    """The rows of the card's score table."""
    return "\n".join(
        f"| {kind} | {row['problems']} | {row['exact_match']:.1%} |" for kind, row in scores.items()
    )


def write_card(
    folder: Path,
    plan: Plan,
    model: LlamaForCausalLM,
    scores: dict[str, dict[str, float]],
    seconds: float,
) -> None:
    """Write MODEL_CARD.md and scores.json into the model's folder."""
    config = model.config
    run = {
        "seed": plan.seed,
        "steps": plan.steps,
        "tokens": plan.steps * plan.tokens_a_step,
        "seconds": round(seconds),
        "parameters": model.num_parameters(),
    }
    card = _CARD.format(
        **run,
        minutes=seconds / 60,
        window=plan.window,
        context=config.max_position_embeddings,
        long=sum(plan.at(step)[1] for step in range(plan.steps)),
        rate=plan.cycles[0].peak_rate,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocabulary=config.vocab_size,
        rows=table(scores),
        facts=len(FACTS),
        categories=len(MEMBERS),
        examples="\n\n".join(_example(title, document) for title, document in EXAMPLES),
    )
    write_text(folder, "MODEL_CARD.md", card)
    write_text(folder, "scores.json", json.dumps({**run, "scores": scores}, indent=2) + "\n")
