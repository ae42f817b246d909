"""A stand-in for the accelerator: exact, slow, and honest about what each input attended to.

It carries out step messages (`piehost.wire.step`) over plain dictionaries. The "hidden state" of an
input is the sorted list of (position, token) it attended to, and the token sampled from it is a
checksum of that list, so one wrong slot anywhere changes every later token.
"""

from __future__ import annotations

import zlib
from array import array

from piehost.wire.step import LATE_STEPS, MAX_SAMPLES, Step, StepDone

Attended = tuple[tuple[int, int], ...]


def ints(data: bytes) -> list[int]:
    out = array("i")
    out.frombytes(data)
    return out.tolist()


def next_token(attended: Attended, vocab: int) -> int:
    """What the toy model says after these (position, token) pairs."""
    return zlib.crc32(repr(sorted(attended)).encode()) % vocab


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
    def __init__(self, page_size: int, vocab: int) -> None:
        self.page_size = page_size
        self.vocab = vocab
        self.slots: dict[int, tuple[int, int]] = {}  # slot -> (position, token); absent: unwritten
        self.hidden: set[int] = set()  # slots made invisible
        self.rows: dict[int, Attended] = {}
        self.late: dict[int, int] = {}
        self.steps: list[Step] = []

    def run(self, step: Step) -> StepDone:
        self.steps.append(step)
        for page in ints(step.clear_pages):
            for slot in range(page * self.page_size, (page + 1) * self.page_size):
                self._clear(slot)
        for slot in ints(step.clear_slots):
            self._clear(slot)
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
        self._forward(step)
        tokens = array("i")
        for k, row in enumerate(ints(step.sample_rows)):
            token = next_token(self.rows[row], self.vocab)
            self.late[step.step % LATE_STEPS * MAX_SAMPLES + k] = token
            tokens.append(token)
        return StepDone(step.step, tokens.tobytes(), [k for _, k, _, _ in step.dists])

    def _clear(self, slot: int) -> None:
        self.slots.pop(slot, None)
        self.hidden.discard(slot)

    def _forward(self, step: Step) -> None:
        tokens = [t if t >= 0 else self.late[~t] for t in ints(step.tokens)]
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
