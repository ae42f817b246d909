"""Queued commands that read the model's next token: sample, with all that controls it, and
get_next_dist.

What a sample brings along counts against its inferlet's share of the step (256 tokens of history,
85 of bias, or 512 entries of a distribution are one sample more) and against what a step takes from
all (`has_shaping`, `has_entries`).
"""

from __future__ import annotations

import random
from typing import Final

from inferlet import abi
from inferlet.errors import ArgumentError, HandleError, QuotaError, UnwrittenError

from .forward import embeds, stopped, unwritten
from .histories import has_room, usable
from .items import Dist, Sampled, SampledWithMore
from .run import Run
from .seat import Seat
from .tables import Entry, Hidden, History, Late, any_dead, undecided

_LARGEST_F32: Final = 3.4028234663852886e38
_SHARE_NUMBERS: Final = 256  # 32-bit numbers of bias and history that count as one sample
_SHARE_ENTRIES: Final = 512  # entries of a distribution that do
_NO_PENALTIES: Final = (1.0, 0.0, 0.0)


def sample(run: Run, c: abi.Sample) -> bool:
    seat, queue, builder = run.seat, run.queue, run.builder
    controlled = bool(c.history or c.mask is not None or c.bias or c.k or c.logprobs)
    history = looked_at = None  # looked_at: if its tokens have to be known
    work, room = 1, True
    if controlled:
        history = _history(seat, c.history)
        looked_at = None if _penalties(c) == _NO_PENALTIES else history
        entries = min(c.k, run.machine.model.vocab_size)
        work, numbers = _work(c, looked_at, entries)
        room = builder.has_shaping(numbers) and (not entries or builder.has_entries(entries))
    if builder.full or not (room and run.has_share(work)):
        queue.pipelined = True
        return False
    if controlled:
        _check(run, c)
    entry, position = _entry(run, c.emb)
    if type(entry) is Late and entry.undecided:
        return False  # wrong, or stopped
    hidden = _hidden(entry)
    if c.token not in seat.tokens and len(seat.tokens) >= seat.limits.tokens:
        raise QuotaError(
            f"{len(seat.tokens)} tokens held; the cap is {seat.limits.tokens}",
            "dealloc_token those done with, or sample under a handle again",
        )
    if history is not None and not has_room(seat, 1):
        return False
    if hidden is None:
        seat.tokens[c.token] = Late.dropped(queue)
        run.answer(c.req, None)
        return True
    if looked_at is not None and not usable(run, looked_at, hidden.lates):
        return False
    uniform = 0.0
    if c.temperature > 0.0:
        uniform = random.random() if c.seed is None else _draw(c.seed, position)
    index = builder.sample(hidden.row, c.temperature, c.top_k, c.top_p, c.min_p, uniform)
    late = Late(queue, builder.number, index, undecided(hidden.lates), bool(c.stop))
    seat.tokens[c.token] = late
    run.take_share(work)
    if controlled:
        _control(run, c, index, looked_at)
    if history is not None:
        history.extend([late])
        seat.history_held += 1
    if c.logprobs or c.k:
        dist = _dist(run, hidden, c.k, c.offset) if c.k else None
        logprob = builder.logprob(index)
        run.flight.add(queue, SampledWithMore(queue, late, c.req, c.stop, c.lazy, logprob, dist))
    else:
        run.flight.add(queue, Sampled(queue, late, c.req, c.stop, c.lazy))
    return True


def _penalties(c: abi.Sample) -> tuple[float, float, float]:
    return (c.repetition_penalty, c.presence_penalty, c.frequency_penalty)


def _work(c: abi.Sample, history: History | None, entries: int) -> tuple[int, int]:
    """What it counts as, in samples, and the 32-bit numbers that it brings along. `entries` of its
    distribution."""
    numbers = 3 * len(c.bias) + (len(history) if history is not None else 0)
    work = 1 + numbers // _SHARE_NUMBERS
    return (work + _work_of_dist(entries) if entries else work), numbers


def _work_of_dist(entries: int) -> int:
    return 1 + entries // _SHARE_ENTRIES


def _control(run: Run, c: abi.Sample, index: int, history: History | None) -> None:
    """Packs what changes the logits of the step's sample `index`."""
    if c.mask is not None:
        run.builder.mask_sample(index, run.seat.number, c.mask)
        run.risk()
    run.builder.bias(index, c.bias)
    if history is not None:
        run.builder.penalize(index, *_penalties(c), history)


def _history(seat: Seat, handle: int | None) -> History | None:
    """HandleError."""
    if handle is None:
        return None
    history = seat.histories.get(handle)
    if history is None:
        raise HandleError(f"no history has handle {handle}", "alloc_history it first")
    history.settle()
    return history


def _check(run: Run, c: abi.Sample) -> None:
    """ArgumentError if its ring ranges or its bias are wrong."""
    vocab, limits = run.machine.model.vocab_size, run.seat.limits
    if c.k:
        _check_dist(run, c.k, c.offset)
    if c.mask is not None and c.mask + (vocab + 7) // 8 > limits.ring_in_bytes:
        raise ArgumentError(
            f"a token mask of {(vocab + 7) // 8} octets at offset {c.mask} of a ring of "
            f"{limits.ring_in_bytes}",
            "use an offset that leaves room for a bit for each token",
        )
    for token, value in c.bias:
        if token >= vocab:
            raise ArgumentError(
                f"a bias for token id {token}; the vocabulary has {vocab}",
                "take ids from tokenize or get_vocabs",
            )
        if not abs(value) <= _LARGEST_F32:  # nor NaN
            raise ArgumentError(f"a bias of {value}", "to forbid a token use a mask, or -1e9")


def get_next_dist(run: Run, c: abi.GetNextDist) -> bool:
    _check_dist(run, c.k, c.offset)
    entry, _ = _entry(run, c.emb)
    if type(entry) is Late and entry.undecided:
        return False  # wrong, or stopped
    hidden = _hidden(entry)
    if hidden is None:
        run.answer(c.req, None)
        return True
    entries = min(c.k, run.machine.model.vocab_size)
    work = _work_of_dist(entries)
    if run.builder.full or not (run.has_share(work) and run.builder.has_entries(entries)):
        run.queue.pipelined = True
        return False
    index = _dist(run, hidden, c.k, c.offset)
    run.flight.add(run.queue, Dist(run.queue, index, undecided(hidden.lates), c.req))
    run.take_share(work)
    return True


def _check_dist(run: Run, k: int, offset: int) -> None:
    """ArgumentError unless k entries may be written there."""
    limits = run.seat.limits
    count = min(k, run.machine.model.vocab_size)
    if count == 0 or count > limits.top_k:
        raise ArgumentError(
            f"K is {k}; it must be from 1 to {limits.top_k}",
            "ask for fewer, or launch with a larger --quota top_k",
        )
    if offset % 4 or offset + 8 * count > limits.ring_bytes:
        raise ArgumentError(
            f"{8 * count} octets at offset {offset} of a ring of {limits.ring_bytes}",
            "use an offset that is a multiple of 4 and leaves room for 8 octets an entry",
        )


def _dist(run: Run, hidden: Hidden, k: int, offset: int) -> int:
    """Index among the step's distributions."""
    count = min(k, run.machine.model.vocab_size)
    return run.builder.dist(hidden.row, count, run.seat.number, offset)


def _entry(run: Run, index: abi.Index) -> tuple[Entry, int]:
    """What the embed holds, and its position."""
    handle, i = index
    emb = embeds(run.seat, (handle, i, 1), "emb")
    return emb.entries[i], emb.positions[i]


def _hidden(entry: Entry) -> Hidden | None:
    """The vector in an embed; None if making it was dropped."""
    if type(entry) is Hidden:
        return None if any_dead(entry.lates) else entry
    if not unwritten(entry) and stopped(entry):
        return None
    held = "nothing" if unwritten(entry) else "text, where a vector is needed"
    raise UnwrittenError(f"the embed holds {held}", "give it to forward as an output first")


def _draw(seed: int, position: int) -> float:
    """A number in [0, 1) from the seed and the position alone (SplitMix64, Steele et al. 2014)."""
    mask = 0xFFFFFFFFFFFFFFFF
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)
