"""Several generations at once, in a program without an event loop: their steps share batches.

    for which, piece in interleave([a.generate(64), b.generate(64)]):
        ...

Under asyncio, tasks with an `async for` each do the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol, TypeVar, Unpack

from .checks import integer, wrong_type
from .context import Context
from .errors import ArgumentError
from .generation import TextOptions, TextStream, TokenStream

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_SEEDS = 1 << 64


class Stream(Protocol[T_co]):
    """What `Context.generate` and `generate_tokens` give."""

    def __next__(self) -> T_co: ...
    def ahead(self) -> None: ...
    def close(self) -> None: ...


def interleave(streams: Iterable[Stream[T]]) -> Iterator[tuple[int, T]]:
    """What the streams give as (which of them, piece), one piece of each in turn until all have
    ended. Each is of a context of its own. An error of one ends all."""
    live = dict(enumerate(streams))
    for each in live.values():
        _check(each)
    try:
        while live:
            for stream in live.values():
                stream.ahead()
            for which, stream in list(live.items()):
                piece = next(stream, None)
                if piece is None:
                    del live[which]
                else:
                    yield which, piece
    finally:
        for stream in live.values():
            stream.close()


def _check(stream: object) -> None:
    if not isinstance(stream, TextStream | TokenStream):
        raise wrong_type("a stream", stream, "what generate() or generate_tokens() gives")


def generate_all(
    contexts: Iterable[Context], max_tokens: int = 256, **options: Unpack[TextOptions]
) -> list[str]:
    """The continuations of several contexts, generated together. Raises what `Context.generate`
    raises. A sampler or constraint is one for all of them: it must not remember."""
    return _texts([context.generate(max_tokens, **options) for context in contexts])


def _texts(streams: list[TextStream]) -> list[str]:
    pieces: list[list[str]] = [[] for _ in streams]
    for which, piece in interleave(streams):
        pieces[which].append(piece)
    return ["".join(each) for each in pieces]


class Best(NamedTuple):
    """The continuation that was taken."""

    text: str
    mean_logprob: float  # of its tokens; -inf if it has none


def best_of(
    context: Context, n: int, max_tokens: int = 256, **options: Unpack[TextOptions]
) -> Best:
    """Generates `n` continuations together, in forks, and goes on in `context` with the one whose
    tokens have the highest mean log-probability, by the model's own softmax.

    The temperature is 1 unless `options` say else; with a `seed`, fork i draws with `seed` + i.
    A sampler or constraint is one for all of them. ArgumentError for temperature 0, which makes
    all the same, and what `Context.generate` raises; `context` is then as it was before.
    """
    integer("n", n, 256, "1 to 256", least=1)
    if options.get("sampler") is None and options.setdefault("temperature", 1.0) == 0 and n > 1:
        raise ArgumentError(
            f"temperature 0 makes all {n} continuations the same", "use 0.5 to 1.2, or n=1"
        )
    options["logprobs"] = True
    seed = options.get("seed")
    branches = context.fork(n)
    try:
        streams = []
        for i, branch in enumerate(branches):
            if seed is not None:
                options["seed"] = (seed + i) % _SEEDS
            streams.append(branch.generate(max_tokens, **options))
        texts = _texts(streams)
        means = [_mean(stream.logprobs) for stream in streams]
        best = max(range(n), key=means.__getitem__)
        context.join(branches[best])
    finally:
        for branch in branches:
            branch.close()
    return Best(texts[best], means[best])


def _mean(logprobs: list[float]) -> float:
    mean = math.fsum(logprobs) / len(logprobs) if logprobs else -math.inf
    return -math.inf if math.isnan(mean) else mean
