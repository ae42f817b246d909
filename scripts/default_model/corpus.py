"""The training text: documents of all kinds mixed, tokenized and packed into windows.

Step n of seed s always draws the same windows, so a stopped run resumes without a data state.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer
from torch import Tensor

from default_model import arithmetic, chat, expressions, facts, json_forms, lists, react
from default_model.documents import Document, Draw, draw_training

DRAWS: dict[str, Draw] = {
    "facts": facts.draw,
    "arithmetic": arithmetic.draw,
    "react": react.draw,
    "python": expressions.draw,
    "json": json_forms.draw,
    "lists": lists.draw,
    "chat": chat.draw,
}
# Parts of a kind that a mixture may have more of.
PARTS: dict[str, Draw] = {
    "bare": arithmetic.draw_bare,
    "in order": lists.draw_in_order,
    "count": lists.draw_count,
}
Mixture = dict[str, int]  # how often each draw is chosen, counted in documents

# By tokens: 13 % facts, 27 % arithmetic, 21 % ReAct, 10 % Python, 11 % JSON, 6 % lists, 11 % chat.
# This teaches copying and the forms; bare sums need many more examples, which then follow.
FIRST: Mixture = {
    "facts": 36,
    "arithmetic": 28,
    "react": 13,
    "python": 16,
    "json": 13,
    "lists": 10,
    "chat": 8,
}
# By tokens: 10 % facts, 27 % arithmetic, 18 % bare sums on top, 14 % ReAct, the rest a little less.
THEN: Mixture = {
    "facts": 31,
    "arithmetic": 32,
    "bare": 82,
    "react": 10,
    "python": 19,
    "json": 12,
    "lists": 10,
    "chat": 5,
}
# By tokens: 8 % facts, 30 % arithmetic, 9 % bare sums, 13 % ReAct, 14 % Python, 11 % lists.
MORE: Mixture = {
    "facts": 28,
    "arithmetic": 40,
    "bare": 45,
    "react": 10,
    "python": 30,
    "json": 12,
    "lists": 22,
    "chat": 6,
}
# Members drawn at random leave a greedy list with members twice; a fixed order cures that.
SETTLE: Mixture = {
    "facts": 28,
    "arithmetic": 36,
    "bare": 30,
    "react": 9,
    "python": 40,
    "json": 10,
    "lists": 5,
    "in order": 40,
    "count": 20,
    "chat": 6,
}
MIXTURES = {0: FIRST, 600: THEN, 2000: MORE, 3000: SETTLE}  # by their first step


def mixture(step: int) -> Mixture:
    return MIXTURES[max(first for first in MIXTURES if first <= step)]


GIVEN_WEIGHT = 0.1  # the loss of tokens the model is not asked to write


def documents(rng: random.Random, mixed: Mixture) -> Iterator[Document]:
    """Endless training documents; none has a held-out problem."""
    draws = DRAWS | PARTS
    kinds, weights = list(mixed), list(mixed.values())
    while True:
        (kind,) = rng.choices(kinds, weights)
        yield draw_training(draws[kind], rng)


def training_text(seed: int, count: int, mixed: Mixture = FIRST) -> list[str]:
    """A sample of the training text, one string a document."""
    stream = documents(random.Random(seed), mixed)
    return [next(stream).text for _ in range(count)]


def draw_windows(
    tokenizer: Tokenizer, seed: int, step: int, rows: int, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets [rows, length] int64 and loss weights [rows, length] float32.

    Each row starts at a document's start; its last document is cut at the row's end.
    """
    stream = documents(random.Random(f"{seed} {step}"), mixture(step))
    ids, weights = [], []
    for _ in range(rows):
        row_ids: list[int] = []
        row_weights: list[float] = []
        while len(row_ids) <= length:
            segments = next(stream).segments
            for segment, encoded in zip(
                segments, tokenizer.encode_batch([s.text for s in segments]), strict=True
            ):
                row_ids += encoded.ids
                row_weights += [1.0 if segment.taught else GIVEN_WEIGHT] * len(encoded.ids)
        ids.append(row_ids[: length + 1])
        weights.append(row_weights[1 : length + 1])
    tokens = torch.tensor(ids)
    return tokens[:, :-1], tokens[:, 1:], torch.tensor(weights)
