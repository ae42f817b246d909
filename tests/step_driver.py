"""A small batcher for tests and the bench's bare loop: sequences in, `Step` messages out.

It keeps every sequence in its own pages, prefills in chunks and decodes greedily (or as told),
all of them in one ragged batch a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from piehost.wire.step import Step, StepDone


def i32(values: object) -> bytes:
    return np.asarray(values, np.int32).tobytes()


@dataclass
class Sequence:
    prompt: list[int]
    pages: list[int]
    row: int
    done: int = 0  # tokens whose keys and values are in the pages
    output: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


class StepDriver:
    """Runs sequences through `run`, a function from a step to its answer."""

    def __init__(self, run: Callable[[Step], StepDone], page_size: int, chunk: int = 256) -> None:
        self._run = run
        self._page_size = page_size
        self._chunk = chunk
        self._next_page = 0
        self._step = 0
        self.last: StepDone | None = None

    def add(self, prompt: list[int], room: int) -> Sequence:
        """A sequence with pages for `room` tokens more than its prompt."""
        count = -(-(len(prompt) + room) // self._page_size)
        pages = list(range(self._next_page, self._next_page + count))
        self._next_page += count
        return Sequence(prompt, pages, row=self._next_page)

    def step(self, sequences: list[Sequence]) -> None:
        """One step: each sequence's next chunk, and a sampled token where its prompt is done."""
        spans = [(s, s.done, min(len(s.tokens), s.done + self._chunk)) for s in sequences]
        inputs = [end - start for _, start, end in spans]
        ready = [i for i, (s, _, end) in enumerate(spans) if end == len(s.tokens)]
        count = len(ready)
        message = Step(
            self._step,
            tokens=i32([t for s, start, end in spans for t in s.tokens[start:end]]),
            positions=i32([p for _, start, end in spans for p in range(start, end)]),
            write_slots=i32([self._slot(s, p) for s, a, b in spans for p in range(a, b)]),
            paged_inputs=i32(inputs),
            paged_kv=i32([end for *_, end in spans]),
            paged_pages=i32([p for s, _, end in spans for p in s.pages[: self._pages(end)]]),
            keep_inputs=i32(np.cumsum(inputs)[ready] - 1),
            keep_rows=i32([sequences[i].row for i in ready]),
            sample_rows=i32([sequences[i].row for i in ready]),
            temperature=np.zeros(count, np.float32).tobytes(),
            top_k=i32([0] * count),
            top_p=np.ones(count, np.float32).tobytes(),
            min_p=np.zeros(count, np.float32).tobytes(),
            uniform=np.zeros(count, np.float64).tobytes(),
        )
        self._step += 1
        self.last = self._run(message)
        if self.last.error is not None:
            raise RuntimeError(self.last.error)
        for s, _, end in spans:
            s.done = end
        for i, token in zip(ready, np.frombuffer(self.last.tokens, np.int32), strict=True):
            sequences[i].output.append(int(token))

    def generate(self, sequences: list[Sequence], count: int) -> None:
        """Steps until every sequence has `count` new tokens."""
        while left := [s for s in sequences if len(s.output) < count]:
            self.step(left)

    def _pages(self, slots: int) -> int:
        return -(-slots // self._page_size)

    def _slot(self, sequence: Sequence, place: int) -> int:
        page, offset = divmod(place, self._page_size)
        return sequence.pages[page] * self._page_size + offset
