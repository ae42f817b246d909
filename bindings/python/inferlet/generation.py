"""Streams of generated tokens and text: chains of steps queued ahead of the answers.

A chain is queued while half of the one before is still to be answered, so that the accelerator
never waits for the program.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeGuard

from .errors import InferletError
from .sampling import Sampling, Token, check_sampling, check_stop
from .text import StreamDecoder

if TYPE_CHECKING:
    from .context import Context

CHAIN_STEPS = 32  # steps queued at once

FinishReason: TypeAlias = Literal["stop", "length", "closed", "error"]


class TokenStream(Iterator[int], AsyncIterator[int]):
    """Token ids of one generation. `finish_reason` tells, at the end, why it ended."""

    def __init__(
        self, context: Context, max_tokens: int, stop: Sequence[int], sampling: Sampling
    ) -> None:
        self._context = context
        self._stop = check_stop(stop)
        self._sampling = check_sampling(sampling)
        self._left = max_tokens  # not queued yet
        self._start = self._position = len(context)  # of the next token to queue
        self._steps: deque[Token] = deque()  # queued, not looked at yet
        self._begun = False
        self.finish_reason: FinishReason | None = None

    def __next__(self) -> int:
        step = self._next_step()
        if step is None:
            raise StopIteration
        try:
            value = step.result()
        except InferletError:
            self._fail()
            raise
        if not self._goes_on(value):
            raise StopIteration
        return self._keep(value)

    async def __anext__(self) -> int:
        step = self._next_step()
        if step is None:
            raise StopAsyncIteration
        try:
            value = await step
        except InferletError:
            self._fail()
            raise
        if not self._goes_on(value):
            raise StopAsyncIteration
        return self._keep(value)

    def close(self, reason: FinishReason = "closed") -> None:
        """Ends the generation after the last token returned; nothing if it has ended."""
        if self.finish_reason is None:
            steps = list(self._steps)
            self._finish(reason)
            if steps:
                self._context.abandon(steps, self._begun)

    def _next_step(self) -> Token | None:
        """The step whose token comes next, or None at the end."""
        if self.finish_reason is not None:
            return None
        if self._left and len(self._steps) <= CHAIN_STEPS // 2:
            count = min(self._left, CHAIN_STEPS)
            self._steps += self._context.queue_steps(
                self._position,
                count,
                self._stop,
                self._sampling,
                first=self._position == self._start,
                last=count == self._left,
            )
            self._position += count
            self._left -= count
        if not self._steps:
            self._finish("length")
            return None
        return self._steps[0]

    def _goes_on(self, value: int | None) -> TypeGuard[int]:
        """False for a stop token; the steps queued behind it answer None and nobody waits."""
        if value is not None and value not in self._stop:
            return True
        self._context.stopped()
        self._finish("stop")
        return False

    def _keep(self, token: int) -> int:
        self._steps.popleft()
        self._begun = True
        self._context.keep(token)
        return token

    def _fail(self) -> None:
        self._finish("error")
        self._context.restart()

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self._steps.clear()
        self._context.stream_ended()


class TextStream(Iterator[str], AsyncIterator[str]):
    """Text of one generation, in pieces of whole characters; no piece is empty."""

    def __init__(
        self, tokens: TokenStream, decoder: StreamDecoder, stop_strings: Sequence[str]
    ) -> None:
        self.tokens = tokens
        self._decoder = decoder
        self._stop_strings = [text for text in stop_strings if text]
        self._held = ""  # may be the beginning of a stop string

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while it goes on, then `stop`, `length`, `closed` (left early) or `error`."""
        return self.tokens.finish_reason

    def __next__(self) -> str:
        for token in self.tokens:
            if piece := self._piece(self._decoder.feed(token)):
                return piece
        if piece := self._rest():
            return piece
        raise StopIteration

    async def __anext__(self) -> str:
        async for token in self.tokens:
            if piece := self._piece(self._decoder.feed(token)):
                return piece
        if piece := self._rest():
            return piece
        raise StopAsyncIteration

    def close(self) -> None:
        """Ends the generation after the last piece returned; nothing if it has ended."""
        self.tokens.close()

    def _piece(self, text: str) -> str:
        """What of `text` can be told to be before any stop string."""
        if not self._stop_strings:
            return text
        text = self._held + text
        found = [at for stop in self._stop_strings if (at := text.find(stop)) >= 0]
        if found:
            self.tokens.close("stop")
            self._held, self._stop_strings = "", []
            self._decoder.reset()
            return text[: min(found)]
        length = next(
            (
                length
                for length in range(min(len(text), max(map(len, self._stop_strings))), 0, -1)
                if any(stop.startswith(text[-length:]) for stop in self._stop_strings)
            ),
            0,
        )
        cut = len(text) - length
        self._held = text[cut:]
        return text[:cut]

    def _rest(self) -> str:
        """What was held back, at the end."""
        rest, self._held = self._held + self._decoder.finish(), ""
        return rest
