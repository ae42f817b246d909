"""Sampling one token from one row of logits, in NumPy: `docs/abi.md` section 8, for the scripted
model. `sampling.py` is the same on torch, for many rows at once; a test compares the two.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .batch import Ints

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


def penalize(
    logits: Floats,
    history: Ints,
    prompt: int,
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    """Applies penalties to logits [V] in place. `history` are token ids, its first `prompt` ones
    the prompt's: they count for `repetition` alone (Keskar et al. 2019)."""
    seen = np.unique(history)
    own = logits[seen]
    logits[seen] = np.where(own > 0, own / np.float32(repetition), own * np.float32(repetition))
    added, counts = np.unique(history[prompt:], return_counts=True)
    logits[added] -= (presence + frequency * counts).astype(np.float32)


def allow_only(logits: Floats, mask: bytes) -> bool:
    """Takes away every token of logits [V] whose bit in `mask`, least significant first, is 0.
    False, and nothing taken away, if there would be none left."""
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=len(logits), bitorder="little")
    if bits.any():
        logits[bits == 0] = -np.inf
    return bool(bits.any())


def draw(
    logits: Floats, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float
) -> int:
    """The token id taken from logits [V], of which not all may be minus infinity."""
    if temperature == 0:
        return int(logits.argmax())  # the first of equals
    order = np.argsort(-logits, kind="stable")  # most probable first, the lowest id among equals
    if top_k:
        order = order[:top_k]
    weights = np.exp((logits[order].astype(np.float64) - logits[order[0]]) / temperature)
    weights = weights[weights >= min_p]
    cumulative = weights.cumsum()
    if top_p < 1:
        cumulative = cumulative[: np.searchsorted(cumulative, top_p * cumulative[-1]) + 1]
    at = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    return int(order[min(int(at), len(cumulative) - 1)])  # rounding may put it behind the last


def log_softmax(logits: Floats) -> Doubles:
    """Natural logarithms of the probabilities [V] that logits [V] stand for."""
    wide = logits.astype(np.float64) - logits.max()
    result: Doubles = wide - np.log(np.exp(wide).sum())
    return result


def distribution(logits: Floats, k: int) -> bytes:
    """The k most probable of the softmax as a ring holds them: ids u32 [k], chances f32 [k]."""
    ids = np.argsort(-logits, kind="stable")[:k]
    chances = np.exp(log_softmax(logits)[ids])
    return ids.astype("<u4").tobytes() + chances.astype("<f4").tobytes()
