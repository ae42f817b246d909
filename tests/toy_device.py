"""A stand-in for the accelerator: exact, slow, and honest about what each input attended to.

It carries out step messages (`piehost.wire.step`) over plain dictionaries. The "hidden state" of an
input is the list of (position, item) it attended to, an item being a token id or a vector, and its
vector is a checksum of that list, so one wrong slot anywhere changes every later token. What it
says of a vector (`logits`, `log_probability`, `distribution`) depends on the vector alone.
"""

from __future__ import annotations

import hashlib
import math
import struct
from array import array
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from piehost.wire.step import LATE_STEPS, MAX_SAMPLES, Step, StepDone

HIDDEN_SIZE = 4
VECTOR_BYTES = 4 * HIDDEN_SIZE
Attended = tuple[tuple[int, int | bytes], ...]  # (position, token id or vector)


def ints(data: bytes) -> list[int]:
    out = array("i")
    out.frombytes(data)
    return out.tolist()


def floats(data: bytes) -> list[float]:
    out = array("f")
    out.frombytes(data)
    return out.tolist()


# --- the toy model --------------------------------------------------------------------------------


def vector(attended: Attended) -> bytes:
    """f32 [HIDDEN_SIZE] of a hidden state."""
    return _digest(repr(sorted(attended, key=repr)))


def embedding(token: int) -> bytes:
    """f32 [HIDDEN_SIZE] of a token id."""
    return _digest(f"token {token}")


def _digest(text: str) -> bytes:
    parts = struct.unpack("<4H", hashlib.sha256(text.encode()).digest()[:8])
    return struct.pack("<4f", *parts)


def finite(data: bytes) -> bool:
    return all(map(math.isfinite, floats(data)))


def token_of(vec: bytes, vocab: int) -> int:
    """The most probable token after a vector."""
    return int.from_bytes(hashlib.sha256(vec).digest()[:4], "little") % vocab


def next_token(attended: Attended, vocab: int) -> int:
    """What the toy model says after these (position, item) pairs."""
    return token_of(vector(attended), vocab)


def logits(vec: bytes, vocab: int) -> npt.NDArray[np.float64]:
    """Highest for `token_of`, and one lower for each id after it, round and round."""
    behind = (np.arange(vocab, dtype=np.float64) - token_of(vec, vocab)) % vocab
    scores: npt.NDArray[np.float64] = vocab / 2 - behind
    return scores


def log_probability(vec: bytes, token: int, vocab: int) -> float:
    return -((token - token_of(vec, vocab)) % vocab) / 8


def distribution(vec: bytes, k: int, vocab: int) -> bytes:
    """u32 [k], then f32 [k]."""
    first = token_of(vec, vocab)
    ids = [(first + i) % vocab for i in range(k)]
    return struct.pack(f"<{k}I{k}f", *ids, *[2.0 ** -(i + 1) for i in range(k)])


@dataclass
class Control:
    """What a sample has beside its parameters."""

    mask: bytes | None = None
    bias: list[tuple[int, float]] = field(default_factory=list)
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    prompt: list[int] = field(default_factory=list)
    added: list[int] = field(default_factory=list)


def choose(vec: bytes, vocab: int, control: Control) -> int | None:
    """The most probable token; None if the mask allows none."""
    scores = logits(vec, vocab)
    for token in {*control.prompt, *control.added}:
        scores[token] *= control.repetition ** (-1 if scores[token] > 0 else 1)
    for token in set(control.added):
        scores[token] -= control.presence + control.frequency * control.added.count(token)
    for token, value in control.bias:
        scores[token] += np.float32(value)
    if control.mask is not None:
        bits = np.unpackbits(np.frombuffer(control.mask, np.uint8), bitorder="little")[:vocab]
        if not bits.any():
            return None
        scores[bits == 0] = -np.inf
    return int(scores.argmax())


def greedy(
    prompt: list[int], count: int, vocab: int, stop: frozenset[int] = frozenset()
) -> list[int]:
    """The reference: plain generation from a prompt at positions 0, 1, 2, ..."""
    text, out = list(prompt), []
    for _ in range(count):
        token = next_token(tuple(enumerate(text)), vocab)
        out.append(token)
        if token in stop:
            break
        text.append(token)
    return out


class ToyDevice:
    """`rings_in` and `rings_out`: octets, by ring number."""

    def __init__(self, page_size: int, vocab: int) -> None:
        self.page_size = page_size
        self.vocab = vocab
        # slot -> (position, item); absent: unwritten
        self.slots: dict[int, tuple[int, int | bytes]] = {}
        self.hidden: set[int] = set()  # slots made invisible
        # place in host memory -> of each slot of a page: what it holds, and whether it is invisible
        self.places: dict[int, list[tuple[tuple[int, int | bytes] | None, bool]]] = {}
        self.rows: dict[int, Attended | bytes] = {}  # a forward's, or a vector from a ring
        self.rings_in: dict[int, bytearray] = {}
        self.rings_out: dict[int, bytearray] = {}
        self.late: dict[int, int] = {}
        self.steps: list[Step] = []

    def run(self, step: Step) -> StepDone:
        self.steps.append(step)
        for page in ints(step.clear_pages):
            for slot in self._of(page):
                self._clear(slot)
        for slot in ints(step.clear_slots):
            self._clear(slot)
        self._swap(step)
        copies = list(zip(ints(step.copy_source), ints(step.copy_target), strict=True))
        held = [(self.slots.get(a), a in self.hidden) for a, _ in copies]
        for (_, target), (value, invisible) in zip(copies, held, strict=True):
            self._clear(target)
            if value is not None:
                self.slots[target] = value
            if invisible:
                self.hidden.add(target)
        self.hidden |= set(ints(step.hide))
        self.hidden -= set(ints(step.show))
        refused = self._vectors_in(step)
        self._forward(step)
        tokens, logprobs = self._sample(step)
        for page in ints(step.swap_out_pages):  # whoever looks for it there later finds nothing
            for slot in self._of(page):
                self._clear(slot)
        return StepDone(
            step.step,
            tokens.tobytes(),
            self._write_dists(step),
            logprobs=logprobs.tobytes(),
            refused=refused,
            embeds=self._vectors_out(step),
        )

    def _swap(self, step: Step) -> None:
        out = zip(ints(step.swap_out_pages), ints(step.swap_out_places), strict=True)
        for page, place in out:
            self.places[place] = [(self.slots.get(s), s in self.hidden) for s in self._of(page)]
        back = zip(ints(step.swap_in_places), ints(step.swap_in_pages), strict=True)
        for place, page in back:
            held = self.places.pop(place)
            for slot, (value, invisible) in zip(self._of(page), held, strict=True):
                self._clear(slot)
                if value is not None:
                    self.slots[slot] = value
                if invisible:
                    self.hidden.add(slot)

    def _of(self, page: int) -> range:
        return range(page * self.page_size, (page + 1) * self.page_size)

    def vector_of(self, row: int) -> bytes:
        held = self.rows[row]
        return held if isinstance(held, bytes) else vector(held)

    def _vectors_in(self, step: Step) -> list[int]:
        rows, refused = iter(ints(step.vector_into)), []
        for i, (ring, offset, count) in enumerate(step.vectors):
            data = bytes(self.rings_in[ring][offset : offset + count * VECTOR_BYTES])
            assert len(data) == count * VECTOR_BYTES, "within the ring"
            if not finite(data):
                refused.append(i)
                data = bytes(len(data))
            for at in range(0, len(data), VECTOR_BYTES):
                self.rows[next(rows)] = data[at : at + VECTOR_BYTES]
        assert next(rows, None) is None
        return refused

    def _vectors_out(self, step: Step) -> list[int]:
        sources = iter(ints(step.embed_from))
        for ring, offset, count in step.embeds:
            for i in range(count):
                source = next(sources)
                data = embedding(~source) if source < 0 else self.vector_of(source)
                self._write(ring, offset + i * VECTOR_BYTES, data)
        assert next(sources, None) is None
        return [count for _, _, count in step.embeds]

    def _write_dists(self, step: Step) -> list[int]:
        for row, k, ring, offset in step.dists:
            self._write(ring, offset, distribution(self.vector_of(row), k, self.vocab))
        return [k for _, k, _, _ in step.dists]

    def _write(self, ring: int, offset: int, data: bytes) -> None:
        assert offset + len(data) <= len(self.rings_out[ring]), "within the ring"
        self.rings_out[ring][offset : offset + len(data)] = data

    def _controls(self, step: Step) -> dict[int, Control]:
        controls: dict[int, Control] = {}
        for sample, ring, offset in step.masks:
            size = (self.vocab + 7) // 8
            mask = bytes(self.rings_in[ring][offset : offset + size])
            assert len(mask) == size, "within the ring"
            controls.setdefault(sample, Control()).mask = mask
        samples, tokens = ints(step.bias_samples), ints(step.bias_tokens)
        assert samples == sorted(samples)
        for sample, token, value in zip(samples, tokens, floats(step.bias_values), strict=True):
            controls.setdefault(sample, Control()).bias.append((token, value))
        history = iter(t if t >= 0 else self.late[~t] for t in ints(step.history))
        for sample, repetition, presence, frequency, prompt, total in step.penalties:
            control = controls.setdefault(sample, Control())
            control.repetition, control.presence = repetition, presence
            control.frequency = frequency
            control.prompt = [next(history) for _ in range(prompt)]
            control.added = [next(history) for _ in range(total - prompt)]
        assert next(history, None) is None
        return controls

    def _sample(self, step: Step) -> tuple[array[int], array[float]]:
        """Tokens, and the log-probabilities asked for."""
        tokens, controls = array("i"), self._controls(step)
        vectors = [self.vector_of(row) for row in ints(step.sample_rows)]
        for k, vec in enumerate(vectors):
            token: int | None = token_of(vec, self.vocab)
            if k in controls:
                token = choose(vec, self.vocab, controls[k])
            tokens.append(-1 if token is None else token)
        for k, token in enumerate(tokens):  # not before: a step knows none of its own
            self.late[step.step % LATE_STEPS * MAX_SAMPLES + k] = max(token, 0)
        wanted = ints(step.logprobs)
        return tokens, array(
            "f", [log_probability(vectors[k], max(tokens[k], 0), self.vocab) for k in wanted]
        )

    def _clear(self, slot: int) -> None:
        self.slots.pop(slot, None)
        self.hidden.discard(slot)

    def _forward(self, step: Step) -> None:
        tokens: list[int | bytes] = [t if t >= 0 else self.late[~t] for t in ints(step.tokens)]
        for index, source in zip(ints(step.vector_inputs), ints(step.vector_rows), strict=True):
            assert tokens[index] == 0
            tokens[index] = self.vector_of(source)
        positions, writes = ints(step.positions), ints(step.write_slots)
        for slot, position, token in zip(writes, positions, tokens, strict=True):
            self.slots[slot] = (position, token)
            self.hidden.discard(slot)
        attended: list[Attended] = []
        at = 0
        pages = iter(ints(step.paged_pages))
        for count, kv in zip(ints(step.paged_inputs), ints(step.paged_kv), strict=True):
            run = [next(pages) for _ in range(-(-kv // self.page_size))]
            slots = [p * self.page_size + o for p in run for o in range(self.page_size)][:kv]
            assert slots[kv - count :] == writes[at : at + count], "inputs are the run's last slots"
            for j in range(count):
                seen = tuple(self.slots[s] for s in slots[: kv - count + j + 1])
                first = seen[0][0]
                assert [p for p, _ in seen] == list(range(first, first + len(seen))), "regular run"
                assert not self.hidden & set(slots[: kv - count + j + 1])
                attended.append(seen)
            at += count
        listed = iter(ints(step.listed_slots))
        segments = zip(
            ints(step.listed_inputs), ints(step.listed_kv), step.listed_masks, strict=True
        )
        for count, kv, mask in segments:
            slots = [next(listed) for _ in range(kv)]
            width = (kv + 7) // 8
            for j in range(count):
                row = None if mask is None else mask[j * width : (j + 1) * width]
                seen_list = []
                for i, slot in enumerate(slots):
                    if slot not in self.slots:
                        continue
                    if row is not None:
                        allowed = bool(row[i // 8] >> (i % 8) & 1)
                    else:
                        allowed = (
                            slot not in self.hidden and self.slots[slot][0] <= positions[at + j]
                        )
                    if allowed:
                        seen_list.append(self.slots[slot])
                attended.append(tuple(seen_list))
            at += count
        assert at == len(tokens)
        for index, keep in zip(ints(step.keep_inputs), ints(step.keep_rows), strict=True):
            self.rows[keep] = attended[index]
