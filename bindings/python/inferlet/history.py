"""Histories: the tokens that the penalties of `sample` look at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, SupportsIndex

from .abi import AllocHistory, Command, DeallocHistory, ExtendHistory
from .errors import ArgumentError
from .sampling import TOKENS_A_COMMAND, Token, token_refs
from .spans import Handle

if TYPE_CHECKING:
    from .command_queue import CommandQueue


class History(Handle):
    """Tokens in the order they were added; freed when nothing refers to it any more.

    Those it was made with, a prompt, count for the repetition penalty alone, those added since for
    all three. `sample(..., history=history)` adds the token it samples. On the queue: QuotaError
    beyond `limits.history`.
    """

    __slots__ = ()
    kind = "histories"

    def __init__(self, queue: CommandQueue, prompt: list[int]) -> None:
        """`prompt` holds token refs. ArgumentError if they are more than a frame holds."""
        # the repetition penalty only looks at whether a token is there, so each is sent once
        distinct = list(dict.fromkeys(prompt))
        super().__init__(queue)
        try:
            queue.runtime.connection.append(AllocHistory(None, queue.number, self.number, distinct))
        except ArgumentError:  # more than a frame holds: it was never made
            self.forget()
            raise

    def extend(self, tokens: Iterable[SupportsIndex | Token]) -> None:
        """Adds `tokens` (ids, or late-bound tokens before their value is known) as if they had
        been sampled. ArgumentError if one is no token id."""
        refs = token_refs(tokens)
        for at in range(0, len(refs), TOKENS_A_COMMAND):
            part = refs[at : at + TOKENS_A_COMMAND]
            self.queue.runtime.connection.append(
                ExtendHistory(None, self.queue.number, self.number, part)
            )

    def dealloc_command(self, number: int) -> Command:
        return DeallocHistory(None, self.queue.number, number)
