"""What a program does to logits before a token is drawn: penalties, bias, token masks.

`docs/abi.md`, section 8, sample, is the definition; the order is the one it gives. Nothing here
touches the logits of samples that ask for none of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from piehost.wire.step import Step

from .batch import Ints, integers, starts

ReadRing = Callable[[int, int, int], bytes | None]  # (ring, offset, octets)


@dataclass(slots=True)
class Shaping:
    """Of the K samples of a step. `refused`: those whose mask allows no token or cannot be read;
    they are drawn as if they had none, and their answer is an error."""

    bias_samples: Ints  # [B] ascending
    bias_tokens: Ints  # [B]
    bias_values: npt.NDArray[np.float32]  # [B]
    masked: Ints  # [M] samples
    masks: npt.NDArray[np.uint8]  # [M, ceil(V / 8)] as in ring in: bit 1, allowed
    penalized: Ints  # [P] samples
    factors: npt.NDArray[np.float32]  # [P, 3] repetition, presence, frequency
    history: torch.Tensor  # i64 [H] on the device
    history_starts: Ints  # [P + 1] into `history`
    prompts: Ints  # [P] how many of a history's tokens are its prompt
    refused: list[int]

    @classmethod
    def of(
        cls,
        step: Step,
        vocab: int,
        read_ring: ReadRing,
        resolve: Callable[[Ints], torch.Tensor],
    ) -> Shaping | None:
        """None if no sample of the step asks for any. `resolve` turns token ids and ~late tokens
        i64 [H] into token ids on the device."""
        if not (step.masks or step.bias_samples or step.penalties):
            return None
        masked, masks, refused = [], [], []
        for sample, ring, offset in step.masks:
            data = read_ring(ring, offset, (vocab + 7) // 8)
            bits = np.unpackbits(np.frombuffer(data or b"", np.uint8), bitorder="little")[:vocab]
            if data is None or not bits.any():
                refused.append(sample)
                continue
            masked.append(sample)
            masks.append(data)
        return cls(
            bias_samples=integers(step.bias_samples),
            bias_tokens=integers(step.bias_tokens),
            bias_values=np.frombuffer(step.bias_values, np.float32),
            masked=np.array(masked, np.int64),
            masks=np.frombuffer(b"".join(masks), np.uint8).reshape(len(masks), (vocab + 7) // 8),
            penalized=np.array([p[0] for p in step.penalties], np.int64),
            factors=np.array([p[1:4] for p in step.penalties], np.float32).reshape(-1, 3),
            history=resolve(integers(step.history)),
            history_starts=starts(np.array([p[5] for p in step.penalties], np.int64)),
            prompts=np.array([p[4] for p in step.penalties], np.int64),
            refused=refused,
        )

    def apply(self, logits: torch.Tensor, first: int) -> torch.Tensor:
        """Logits f32 [R, V] of samples first .. first + R - 1, as they are to be drawn from; the
        argument is left as it is."""
        end = first + len(logits)
        touched = np.concatenate((self.bias_samples, self.masked, self.penalized))
        if not ((touched >= first) & (touched < end)).any():
            return logits
        logits = logits.clone()
        for i in _within(self.penalized, first, end):
            self._penalize(logits[self.penalized[i] - first], int(i))
        biased = _within(self.bias_samples, first, end)
        if len(biased):
            rows = _upload(self.bias_samples[biased] - first, logits)
            tokens = _upload(self.bias_tokens[biased], logits)
            values = _upload(self.bias_values[biased], logits)
            logits.index_put_((rows, tokens), values, accumulate=True)
        masked = _within(self.masked, first, end)
        if len(masked):
            rows = _upload(self.masked[masked] - first, logits)
            bits = np.unpackbits(self.masks[masked], 1, logits.shape[1], "little")
            forbidden = _upload(bits == 0, logits)
            logits[rows] = logits[rows].masked_fill(forbidden, float("-inf"))
        return logits

    def _penalize(self, logits: torch.Tensor, i: int) -> None:
        """Changes `logits` f32 [V] in place (Keskar et al. 2019 for repetition)."""
        repetition, presence, frequency = self.factors[i].tolist()
        begin, end = int(self.history_starts[i]), int(self.history_starts[i + 1])
        tokens = self.history[begin:end]
        if repetition != 1.0:
            seen = logits[tokens]
            penalized = torch.where(seen > 0, seen / repetition, seen * repetition)
            logits.index_copy_(0, tokens, penalized)  # equal values for equal tokens
        if presence or frequency:
            counts = torch.zeros_like(logits)
            added = tokens[int(self.prompts[i]) :]
            counts.index_add_(0, added, torch.ones_like(added, dtype=logits.dtype))
            logits -= frequency * counts + presence * (counts > 0)


def _within(samples: Ints, first: int, end: int) -> npt.NDArray[np.intp]:
    """Where `samples` are among first .. end - 1."""
    return np.flatnonzero((samples >= first) & (samples < end))


def _upload(values: npt.NDArray[np.generic], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device, non_blocking=True)
