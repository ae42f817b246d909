"""Samplers: functions that pick a token of a distribution, for what the parameters of `generate`
cannot say.

    context.generate(sampler=mirostat(tau=4.0), k=512)

A sampler gets the `k` most probable tokens, most probable first, and gives the id of one (or any
other of the vocabulary), or None to end the text. `greedy` is the simplest:

    def greedy(distribution):
        return distribution.argmax()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .checks import integer, number, out_of_range
from .distribution import Distribution

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def mirostat(
    tau: float = 5.0, eta: float = 0.1, seed: int | None = None
) -> Callable[[Distribution], int]:
    """Keeps the surprise of the text near `tau` bits a token: tokens of more than some surprise are
    left out, and that bound follows what came out, with rate `eta` (Basu et al. 2021, "Mirostat",
    in its second version). One for each text: it remembers. ArgumentError if a number is out of
    range."""
    target = _above_zero("tau", tau)
    rate = _above_zero("eta", eta)
    draw = _draws(seed)
    bound = 2 * target

    def sample(distribution: Distribution) -> int:
        nonlocal bound
        surprise = _surprise(distribution)
        kept = max(1, int((surprise <= bound).sum()))  # they ascend
        at = draw(distribution.probs[:kept])
        bound -= rate * (float(surprise[at]) - target)
        return int(distribution.ids[at])

    return sample


def typical(mass: float = 0.9, seed: int | None = None) -> Callable[[Distribution], int]:
    """Locally typical sampling (Meister et al. 2023): draws from the fewest tokens that reach
    `mass` of the probability, those first whose surprise is nearest to the distribution's entropy.
    ArgumentError if a number is out of range."""
    valid = "above 0, to 1"
    reach = number("mass", mass, valid)
    if not 0 < reach <= 1:
        raise out_of_range("mass", reach, valid)
    draw = _draws(seed)

    def sample(distribution: Distribution) -> int:
        surprise = _surprise(distribution)
        probs = distribution.probs / distribution.probs.sum()
        entropy = float((probs * surprise).sum())
        order = abs(surprise - entropy).argsort(kind="stable")
        kept = order[: int((probs[order].cumsum() < reach).sum()) + 1]
        return int(distribution.ids[kept[draw(probs[kept])]])

    return sample


def _surprise(distribution: Distribution) -> NDArray[np.float64]:
    """In bits, of each token; of one with probability 0, very large."""
    import numpy as np  # slow to import, and few programs need it

    distribution.argmax()  # UnwrittenError if there is none
    surprise: NDArray[np.float64] = -np.log2(np.maximum(distribution.probs, 1e-38), dtype=float)
    return surprise


def _draws(seed: int | None) -> Callable[[NDArray[np.float32]], int]:
    """Draws an index with the given (not normalised) probabilities, by inverse CDF."""
    if seed is not None:
        seed = integer("seed", seed, (1 << 64) - 1, "0 to 2**64 - 1")
    import random

    source = random.Random(seed)

    def draw(probs: NDArray[np.float32]) -> int:
        sums = probs.cumsum(dtype=float)
        at = sums.searchsorted(source.random() * sums[-1], side="right")
        return min(int(at), len(sums) - 1)

    return draw


def _above_zero(name: str, value: float) -> float:
    checked = number(name, value, "above 0")
    if not 0 < checked <= 1e6:
        raise out_of_range(name, checked, "above 0, to 1e6")
    return checked
