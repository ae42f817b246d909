"""Random operations on contexts, compared with one plain forward pass over the same tokens.

The oracle keeps, for every token, which tokens it attended to when it was computed. A generated
token must have the log-probability, and be the most probable one, that a forward pass with
exactly that as its mask gives.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from inferlet import Context, Distribution, Model, QuotaError, inferlet, quota, unsave
from inferlet.generation import TokenOptions

CLOSE = 2e-3  # of log-probabilities in float32
MOST = 220  # tokens of a context


@dataclass
class Oracle:
    """What a context must be."""

    tokens: list[int] = field(default_factory=list)
    seen: list[set[int] | None] = field(default_factory=list)  # None: to be computed
    hidden: set[int] = field(default_factory=set)
    evicted: set[int] = field(default_factory=set)
    window: tuple[int, int] | None = None

    def copy(self) -> Oracle:
        seen = [None if s is None else set(s) for s in self.seen]
        return Oracle(list(self.tokens), seen, set(self.hidden), set(self.evicted), self.window)

    def fill(self, tokens: list[int]) -> None:
        self.tokens += tokens
        self.seen += [None] * len(tokens)

    def compute(self, end: int, generated: int | None = None) -> None:
        """Tokens before `end` are computed; those from `generated` on see through the window."""
        for i in range(end):
            if self.seen[i] is None:
                sees = {j for j in range(i) if j not in self.hidden}
                if self.window is not None and generated is not None and i >= generated:
                    sink, recent = self.window
                    sees = {j for j in sees if j < sink or j >= i - recent}
                self.seen[i] = sees | {i}

    def change(self) -> None:
        self.compute(len(self.tokens) - 1)
        if self.seen:
            self.seen[-1] = None

    def generated(self, tokens: list[int]) -> list[int]:
        """They came out. Gives the positions whose outputs they are."""
        begin = len(self.tokens)
        self.seen[-1] = None
        self.compute(begin)
        self.fill(tokens)
        self.compute(len(self.tokens) - 1, generated=begin)
        if self.window is not None and tokens:
            sink, recent = self.window
            gone = set(range(sink, max(sink, len(self.tokens) - 1 - recent)))
            self.hidden |= gone
            self.evicted |= gone
        return list(range(begin - 1, len(self.tokens) - 1))

    def trim(self, length: int) -> None:
        del self.tokens[length:], self.seen[length:]
        if self.seen:
            self.seen[-1] = None
        self.hidden = {i for i in self.hidden if i < length}
        self.evicted = {i for i in self.evicted if i < length}

    def restart(self) -> None:
        self.seen = [None] * len(self.tokens)

    def check(self, model: Model, positions: list[int], logprobs: list[float]) -> None:
        """The tokens behind `positions` are the most probable ones, as probable as told."""
        if not positions:
            return
        count = positions[-1] + 1
        mask = np.zeros((count, count), np.bool_)
        for i in range(count):
            for j in self.seen[i] or {i}:
                mask[i, j] = True
        with model.queue() as q:
            out = q.forward(q.embed_txt(self.tokens[:count]), outputs=len(positions), mask=mask)
            dists = [q.get_next_dist(out[i], k=model.vocab_size) for i in range(len(positions))]
            for at, told, future in zip(positions, logprobs, dists, strict=True):
                dist = future.result()
                prob = float(dist.probs[dist.ids == self.tokens[at + 1]][0])
                assert abs(np.log(prob) - told) < CLOSE, (at, float(np.log(prob)), told)
                assert prob > dist.probs[0] * (1 - CLOSE), at


class Run:
    def __init__(self, model: Model, seed: int) -> None:
        self.model, self.random = model, random.Random(seed)
        self.name = f"fuzz-{seed}"
        self.pairs = [(model.context(), Oracle())]
        self.failures = 0

    def tokens(self, most: int) -> list[int]:
        return [self.random.randrange(3, self.model.vocab_size) for _ in range(most)]

    def step(self, what: str) -> None:
        r = self.random
        at = r.randrange(len(self.pairs))
        context, oracle = self.pairs[at]
        length = len(oracle.tokens)
        first = r.randrange(length + 1)
        end = r.randrange(first, length + 1)
        if what == "fill" and length < MOST:
            more = self.tokens(r.choice([1, 2, 7, 16, 40]))
            context.fill(more)
            oracle.fill(more)
        elif what == "generate" and 0 < length < MOST:
            self.generate(context, oracle, r.choice([1, 2, 17, 40]))
        elif what == "leave" and 0 < length < MOST:
            self.generate(context, oracle, r.choice([0, 1, 3, 20]), leave=True)
        elif what == "trim":
            length = r.choice([first, max(0, length - r.randrange(4))])
            context.trim(length)
            oracle.trim(length)
        elif what == "mask":
            context.mask(first, end)
            oracle.change()
            oracle.hidden |= set(range(first, end))
        elif what == "show" and not oracle.evicted & set(range(first, end)):
            context.mask(first, end, visible=True)
            oracle.change()
            oracle.hidden -= set(range(first, end))
        elif what == "evict":
            context.evict(first, end)
            oracle.change()
            oracle.hidden |= set(range(first, end))
            oracle.evicted |= set(range(first, end))
        elif what == "window":
            sink, recent = r.choice([(0, 5), (4, 20), (3, 50), (20, 1)])
            oracle.window = r.choice([(sink, recent), None])
            context.window(sink, recent if oracle.window else None)
        elif what == "fork" and len(self.pairs) < 4:
            for fork in context.fork(r.choice([1, 2])):
                self.pairs.append((fork, oracle.copy()))
        elif what == "join" and len(self.pairs) > 1:
            branch, told = self.pairs.pop(at)
            kept, _ = self.pairs[at % len(self.pairs)]
            kept.join(branch)
            self.pairs[at % len(self.pairs)] = (kept, told)
        elif what == "drop" and len(self.pairs) > 1:
            self.pairs.pop(at)[0].close()
        elif what == "save" and length and not oracle.hidden and len(self.pairs) < 4:
            context.save(self.name)
            self.pairs.append((self.model.restore(self.name), oracle.copy()))
            self.pairs[-1][1].window = None
            unsave(self.name)
        elif what == "fail" and 0 < length < MOST:
            self.fail(context, oracle)
        for context, oracle in self.pairs:
            assert context.tokens == oracle.tokens
            assert {i for a, b in context.hidden for i in range(a, b)} == oracle.hidden

    def generate(self, context: Context, oracle: Oracle, count: int, leave: bool = False) -> None:
        r = self.random
        options: TokenOptions = {"stop": [], "logprobs": True}
        if r.randrange(3) == 0:
            options["sampler"], options["k"] = Distribution.argmax, 5
        stream = context.generate_tokens(100 if leave else count, **options)
        stream.ahead()
        tokens = [next(stream) for _ in range(count)]
        if leave:
            stream.ahead()
            assert stream.finish_reason is None
        stream.close()
        oracle.check(self.model, oracle.generated(tokens), stream.logprobs)

    def fail(self, context: Context, oracle: Oracle) -> None:
        """Generates with all pages taken away, then again with them."""
        with self.model.queue() as hog:
            kept = []  # pages are freed when nothing refers to them
            while left := int(quota().result()["kv_pages"]):
                with contextlib.suppress(QuotaError):  # what other queues were about to take
                    kept.append(hog.alloc_kvpage(left))
                    hog.synchronize().result()
            stream = context.generate_tokens(60, stop=[], logprobs=True)
            tokens = []
            try:
                tokens += list(stream)
            except QuotaError:
                self.failures += 1
                assert stream.finish_reason == "error"
                tokens = context.tokens[len(oracle.tokens) :]
            positions = oracle.generated(tokens)
            del kept
            hog.synchronize().result()
        oracle.check(self.model, positions, stream.logprobs)
        if stream.finish_reason == "error":
            oracle.restart()


WEIGHTS = {
    "fill": 6,
    "generate": 6,
    "leave": 3,
    "trim": 3,
    "mask": 3,
    "show": 2,
    "evict": 2,
    "window": 2,
    "fork": 2,
    "join": 1,
    "drop": 1,
    "save": 2,
    "fail": 2,
}


@inferlet
def main(model: Model, seed: int, runs: int, steps: int = 30) -> Iterator[str]:
    failures = 0
    for one in range(seed, seed + runs):
        run = Run(model, one)
        done: list[str] = []
        try:
            for what in run.random.choices(list(WEIGHTS), list(WEIGHTS.values()), k=steps):
                done.append(what)
                run.step(what)
        except BaseException:
            print(f"seed {one}: {done}")
            raise
        failures += run.failures
        for context, _ in run.pairs:
            context.close()
    left = quota().result()
    assert left["kv_pages"] == model.runtime.startup.limits.kv_pages, left
    assert left["embeds"] == model.runtime.startup.limits.embeds, left
    yield f"{runs} runs with {failures} failures"
