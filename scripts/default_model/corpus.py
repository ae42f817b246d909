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
# How often each kind is drawn, counted in documents: about 14 % of the tokens are facts, 24 %
# arithmetic, 20 % ReAct, 10 % Python, 12 % JSON, 8 % lists, 12 % chat.
SHARES = {
    "facts": 36,
    "arithmetic": 28,
    "react": 13,
    "python": 16,
    "json": 13,
    "lists": 10,
    "chat": 8,
}
GIVEN_WEIGHT = 0.1  # the loss of tokens the model is not asked to write


def documents(rng: random.Random) -> Iterator[Document]:
    """Endless training documents; none has a held-out problem."""
    kinds, weights = list(SHARES), list(SHARES.values())
    while True:
        (kind,) = rng.choices(kinds, weights)
        yield draw_training(DRAWS[kind], rng)


def training_text(seed: int, count: int) -> list[str]:
    """A sample of the training text, one string a document."""
    stream = documents(random.Random(seed))
    return [next(stream).text for _ in range(count)]


def draw_windows(
    tokenizer: Tokenizer, seed: int, step: int, rows: int, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets [rows, length] int64 and loss weights [rows, length] float32.

    Each row starts at a document's start; its last document is cut at the row's end.
    """
    stream = documents(random.Random(f"{seed} {step}"))
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
