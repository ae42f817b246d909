"""Queued commands on histories, and what a sample may do with one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from inferlet import abi
from inferlet.errors import ArgumentError, HandleError, QuotaError, UnwrittenError

from .run import Run
from .seat import Seat, unused
from .tables import History, Late, follows, undecided

MAX_HISTORIES: Final = 256  # handles; those without tokens take memory too
# Tokens from the first unknown one on that a sample looks through one by one, and how many of them
# may yet be dropped: with more it waits till they are known.
_MOST_TAIL: Final = 256
_MOST_DOUBTFUL: Final = 4


def alloc_history(run: Run, c: abi.AllocHistory) -> bool:
    seat = run.seat
    unused(seat.histories, c.history, "history")
    if len(seat.histories) >= MAX_HISTORIES:
        raise QuotaError(f"{MAX_HISTORIES} histories are open", "dealloc_history those done with")
    prompt = _tokens(run, c.prompt)
    if not has_room(seat, len(prompt), prompt):
        return False
    seat.histories[c.history] = History(run.queue, prompt)
    seat.history_held += len(prompt)
    run.answer(c.req, None)
    return True


def extend_history(run: Run, c: abi.ExtendHistory) -> bool:
    seat = run.seat
    history = seat.histories.get(c.history)
    if history is None:
        raise HandleError(f"no history has handle {c.history}", "alloc_history it first")
    tokens = _tokens(run, c.tokens)
    if not has_room(seat, len(tokens), tokens):
        return False
    history.settle()
    history.extend(tokens)
    seat.history_held += len(tokens)
    run.answer(c.req, None)
    return True


def dealloc_history(run: Run, c: abi.DeallocHistory) -> bool:
    history = run.seat.histories.pop(c.history, None)
    if history is None:
        raise HandleError(f"no history has handle {c.history}", "free it once")
    run.machine.free_history(run.seat, history)
    run.answer(c.req, None)
    return True


def has_room(seat: Seat, wanted: int, tokens: Sequence[int | Late] = ()) -> bool:
    """False if that depends on tokens not known yet, of histories or of `tokens`. QuotaError."""
    limit = seat.limits.history
    if seat.history_held + wanted <= limit:
        return True
    for history in seat.histories.values():
        if history.tail:
            history.settle()
    if seat.history_held + wanted <= limit:
        return True
    if any(type(token) is Late for token in tokens) or any(
        history.tail for history in seat.histories.values()
    ):
        return False
    raise QuotaError(
        f"{wanted} tokens more than the {seat.history_held} in histories; the cap is {limit}",
        "dealloc_history those done with, or launch with a larger --quota history",
    )


def usable(run: Run, history: History, lates: tuple[Late, ...]) -> bool:
    """True if a sample made from `lates` may look at the history in the open step.

    What of it is not known yet must be known to the device by then; and if it may yet be dropped,
    its dropping must drop the sample as well. The history has been settled.
    """
    if not history.tail:
        return True
    if len(history.tail) > _MOST_TAIL:
        return False
    pending = tuple(token for token in history.tail if type(token) is Late)
    if any(late.value is None and late.step == run.builder.number for late in pending):
        run.queue.pipelined = True
        return False
    doubtful = undecided(pending)
    if any(late.doomed for late in pending) or len(doubtful) > _MOST_DOUBTFUL:
        return False
    return not doubtful or follows(lates, doubtful)


def _tokens(run: Run, refs: list[int]) -> list[int | Late]:
    """Tokens of refs; those stopped or dropped already are left out.

    ArgumentError, UnwrittenError.
    """
    vocab, tokens = run.machine.model.vocab_size, []
    for ref in refs:
        if ref >= vocab:
            raise ArgumentError(
                f"token id {ref}; the vocabulary has {vocab}",
                "take ids from tokenize or get_vocabs",
            )
        token = ref if ref >= 0 else late_bound(run.seat, ~ref)
        if type(token) is int or not token.doomed:  # type: ignore[union-attr]
            tokens.append(token)
    return tokens


def late_bound(seat: Seat, handle: int) -> int | Late:
    """The token under a handle; its id once it is known and alive. UnwrittenError."""
    late = seat.tokens.get(handle)
    if late is None or late.lost:
        raise UnwrittenError(f"no token was sampled under handle {handle}", "sample it first")
    return late if late.dead or late.value is None else late.value
