"""From logits to tokens and distributions, all rows of a step at once.

`docs/abi.md` section 8 is the definition: logits over temperature, then top_k, min_p, top_p, then a
draw by inverse CDF, most probable first, the lowest id first among equals. top_p counts shares of
what top_k and min_p have left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from piehost.wire.step import Step

# Most draws fall among the most probable tokens: look there first, sort everything only for
# the rows whose draw falls outside.
_HEAD: Final = 1024


@dataclass(slots=True)
class SamplingParams:
    """Parameters of K samples; arrays [K], as in `wire.step.Step`."""

    temperature: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int32]
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]
    uniform: npt.NDArray[np.float64]

    @classmethod
    def of(cls, step: Step) -> SamplingParams:
        return cls(
            temperature=np.frombuffer(step.temperature, np.float32),
            top_k=np.frombuffer(step.top_k, np.int32),
            top_p=np.frombuffer(step.top_p, np.float32),
            min_p=np.frombuffer(step.min_p, np.float32),
            uniform=np.frombuffer(step.uniform, np.float64),
        )

    def take(self, rows: npt.NDArray[np.intp]) -> SamplingParams:
        return SamplingParams(
            self.temperature[rows],
            self.top_k[rows],
            self.top_p[rows],
            self.min_p[rows],
            self.uniform[rows],
        )


def sample(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """logits f32 [K, V] -> token ids i32 [K] on the same device."""
    tokens = logits.argmax(-1).to(torch.int32)  # the first of equals
    drawn = np.flatnonzero(params.temperature > 0)
    if len(drawn) == 0:
        return tokens
    rows = torch.from_numpy(drawn).to(logits.device)
    params = params.take(drawn)
    heat = torch.from_numpy(params.temperature).to(logits.device)[:, None]
    own = logits[rows]
    own = (own - own.amax(-1, keepdim=True)) / heat  # at most 0: no overflow however cold
    tokens[rows] = _draw(own, params)
    return tokens


def _draw(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    vocab = logits.shape[1]
    head = min(vocab, max(_HEAD, int(params.top_k.max())))
    if logits.device.type != "cpu":  # to ask whether the head was enough would wait for the device
        head = vocab
    tokens, found = _draw_among(logits, params, head)
    if head < vocab and not bool(found.all()):
        rest = (~found).nonzero()[:, 0]
        tokens[rest], _ = _draw_among(logits[rest], params.take(rest.numpy()), vocab)
    return tokens


def _draw_among(
    logits: torch.Tensor, params: SamplingParams, head: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws among the `head` most probable: (ids i32 [R], bool [R] whether that settles it)."""
    device = logits.device
    top_k = torch.from_numpy(params.top_k.astype(np.int64)).to(device)[:, None]
    top_p = torch.from_numpy(params.top_p.astype(np.float64)).to(device)[:, None]
    min_p = torch.from_numpy(params.min_p.astype(np.float64)).to(device)[:, None]
    uniform = torch.from_numpy(params.uniform.copy()).to(device)[:, None]

    values, ids = most_probable(logits, head)
    weights = (values.double() - values[:, :1]).exp()  # relative to the most probable
    everything = (logits - values[:, :1]).exp().sum(-1, keepdim=True, dtype=torch.float64)

    place = torch.arange(head, device=device)
    # weight 0 is a token that a mask forbids, or one so improbable that no draw reaches it
    kept = ((top_k == 0) | (place < top_k)) & (weights >= min_p) & (weights > 0)
    whole = ((top_k > 0) & (top_k <= head)) | (weights[:, -1:] < min_p)
    whole = whole | (head == logits.shape[1])  # nothing outside the head counts
    cumulative = (weights * kept).cumsum(-1)
    mass = torch.where(whole, cumulative[:, -1:], everything)
    open_tail = ~whole & (min_p > 0)  # min_p cuts somewhere outside: the mass is not known

    reaches = cumulative >= top_p * mass
    last = reaches.to(torch.int8).argmax(-1, keepdim=True)
    reached = reaches[:, -1:]
    nucleus = reached & (top_p < 1)
    mass = torch.where(nucleus, cumulative.gather(1, last), mass)
    beyond = ~whole & (top_p < 1) & ~reached

    at = torch.searchsorted(cumulative, uniform * mass, right=True)
    end = torch.where(nucleus, last, kept.sum(-1, keepdim=True) - 1)
    found = ((at < head) | whole) & ~open_tail & ~beyond
    at = torch.minimum(at, end)  # rounding may put the draw behind the last
    return ids.gather(1, at)[:, 0].to(torch.int32), found[:, 0]


def most_probable(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of logits f32 [R, V], largest first, the lowest id first among equals:
    (f32 [R, k], i64 [R, k])."""
    vocab = logits.shape[1]
    if 4 * k >= vocab:
        values, ids = logits.sort(stable=True, dim=-1, descending=True)
        return values[:, :k], ids[:, :k]
    # topk breaks ties as it likes, so give it unique keys: the float's bits, made to sort as
    # integers do, above the complement of the id
    bits = (logits + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    keys = (ordered << 32) | (vocab - 1 - torch.arange(vocab, device=logits.device))
    ids = vocab - 1 - (keys.topk(k, -1).values & 0xFFFFFFFF)
    return logits.gather(1, ids), ids


def distributions(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax of logits f32 [R, V], the k most probable: (ids i32 [R, k], f32 [R, k])."""
    values, ids = most_probable(logits, k)
    return ids.to(torch.int32), (values - logits.logsumexp(-1, keepdim=True)).exp()


def log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """f32 [R] natural logarithms of what the softmax of logits f32 [R, V] gives tokens i32 [R]."""
    own = logits.gather(1, tokens[:, None].to(torch.int64))[:, 0]
    return own - logits.logsumexp(-1)
