"""The shape of one training document, and the rule that keeps held-out problems out of training.

A document is a list of segments. Taught segments are what the model must produce; the others are
what a user, a tool or a runtime puts in front of it. Segments break only where the tokenizer
breaks too, so a prompt tokenized alone gives the same tokens as inside its document.

A document names its problems by keys, such as "47 + 38". One problem in ten is held out, chosen
by a hash of its key: a training document has no held-out key, in any kind of text.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Segment:
    """A piece of text; `taught` when the model is the one to write it."""

    text: str
    taught: bool


@dataclass(frozen=True)
class Document:
    """One training document or test problem.

    keys: the problems inside; the first is the one asked, the others are steps on the way.
    """

    kind: str
    segments: tuple[Segment, ...]
    keys: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)

    @property
    def asks_held_out(self) -> bool:
        """True when the problem asked may serve as a test: its first key is held out."""
        return bool(self.keys) and is_held_out(self.keys[0])

    @property
    def may_train(self) -> bool:
        """True when no problem inside is held out."""
        return not any(is_held_out(key) for key in self.keys)


Draw = Callable[[random.Random], Document]


def is_held_out(key: str) -> bool:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def given(text: str) -> Segment:
    """A segment put in front of the model."""
    return Segment(text, taught=False)


def taught(text: str) -> Segment:
    """A segment the model must write."""
    return Segment(text, taught=True)


def question(kind: str, prompt: str, completion: str, *keys: str) -> Document:
    """The plainest document: one prompt, one completion, then the end of the text."""
    return Document(kind, (given(prompt), taught(completion + END_OF_TEXT)), keys)


def draw_training(draw: Draw, rng: random.Random) -> Document:
    """Draw until the document has no held-out problem."""
    while True:
        document = draw(rng)
        if document.may_train:
            return document


def draw_held_out(draw: Draw, rng: random.Random, count: int) -> list[Document]:
    """`count` test problems with distinct prompts, each asking a held-out problem."""
    chosen: dict[str, Document] = {}
    for _ in range(count * 1000):
        if len(chosen) == count:
            break
        document = draw(rng)
        if document.asks_held_out:
            chosen.setdefault(document.segments[0].text, document)
    return list(chosen.values())
