"""The bare loop: the same backend, in this process, with no inferlet, no controller, no host.

What a monolithic engine's inner loop would cost: one batch of sequences of equal length, greedy,
each step built from the tokens of the last with the least possible work.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from piehost.gpu_backend.backend import Backend
from piehost.wire.step import Step

Ints = npt.NDArray[np.int32]


class BareLoop:
    def __init__(self, threads: int | None) -> None:
        self._backend = Backend("default", kv_pages=4096, threads=threads)
        self._page_size = self._backend.info.page_size
        self._number = 0

    def decode(self, batch: int, prompt_tokens: int, new_tokens: int) -> list[float]:
        """When each step's tokens were there: seconds, monotonic, [new_tokens]."""
        pages_each = -(-(prompt_tokens + new_tokens) // self._page_size)
        pages = np.arange(batch * pages_each, dtype=np.int32).reshape(batch, pages_each)
        prompt = np.array([10 + i % 200 for i in range(prompt_tokens)], dtype=np.int32)
        stamps = []
        tokens = self._step(pages, np.tile(prompt, (batch, 1)), 0)
        stamps.append(time.monotonic())
        for at in range(prompt_tokens, prompt_tokens + new_tokens - 1):
            tokens = self._step(pages, tokens[:, None], at)
            stamps.append(time.monotonic())
        return stamps

    def _step(self, pages: Ints, tokens: Ints, at: int) -> Ints:
        """Runs tokens [batch, n] at positions from `at` on; the next token of each: [batch]."""
        batch, count = tokens.shape
        kv = at + count
        positions = np.arange(at, kv, dtype=np.int32)
        used = pages[:, : -(-kv // self._page_size)]
        size = self._page_size
        writes = pages[:, positions // size] * size + positions % size
        rows = np.arange(batch, dtype=np.int32).tobytes()
        zeros = bytes(4 * batch)
        self._number += 1
        done = self._backend.run(
            Step(
                self._number,
                clear_pages=pages.tobytes() if at == 0 else b"",
                tokens=np.ascontiguousarray(tokens, dtype=np.int32).tobytes(),
                positions=np.tile(positions, batch).tobytes(),
                write_slots=writes.astype(np.int32).tobytes(),
                paged_inputs=np.full(batch, count, dtype=np.int32).tobytes(),
                paged_kv=np.full(batch, kv, dtype=np.int32).tobytes(),
                paged_pages=np.ascontiguousarray(used).tobytes(),
                keep_inputs=np.arange(count - 1, batch * count, count, dtype=np.int32).tobytes(),
                keep_rows=rows,
                sample_rows=rows,
                temperature=zeros,
                top_k=zeros,
                top_p=np.ones(batch, dtype=np.float32).tobytes(),
                min_p=zeros,
                uniform=bytes(8 * batch),
            )
        )
        assert done.error is None, done.error
        return np.frombuffer(done.tokens, dtype=np.int32)
