"""Streams of generated tokens and text: chains of steps queued ahead of the answers.

A chain is queued while half of the one before is still to be answered, so that the accelerator
never waits for the program. With a sampler or a constraint, which look at each token before the
next, a chain is one step.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from .checks import U32_MAX, integer, wrong_type
from .constraints import END, Constraint, packed_mask, restricted
from .distribution import Distribution
from .errors import ArgumentError, InferletError
from .future import Future
from .history import History
from .sampling import Sampling, Token, check_sampling, check_stop, penalizes
from .spans import Embeds
from .text import StreamDecoder

if TYPE_CHECKING:
    from .context import Context

CHAIN_STEPS = 32  # steps queued at once
_COMMANDS_A_STEP = 3
_SAMPLER_TOKENS = 256  # of a sampler's distribution, unless it asks for others

FinishReason: TypeAlias = Literal["stop", "length", "closed", "error"]
Sampler: TypeAlias = Callable[[Distribution], "int | None"]


class TokenOptions(Sampling, total=False):
    """How to generate tokens; what is left out is off, or as said."""

    stop: Sequence[int] | None  # tokens to end before; None, the default: the model's end tokens
    sampler: Sampler | None  # picks each token of those of the `k` most probable that the
    # constraint allows, their probabilities adding up to 1 then; None ends there
    k: int  # 256, or the vocabulary or `limits.top_k` if that is less
    constraint: Constraint | None  # what may come next: see `constraints.py`
    logprobs: bool  # gather each token's log-probability


class TextOptions(TokenOptions, total=False):
    """How to generate text."""

    stop_strings: Sequence[str]  # texts to end before
    stop_when: Callable[[str], bool] | None  # asked with all text so far; True ends behind it


class TokenStream(Iterator[int], AsyncIterator[int]):
    """Token ids of one generation. `finish_reason` tells, at the end, why it ended. With
    `logprobs`, that list holds the natural logarithm of the probability of each token so far, by
    the model's own softmax (NaN if a sampler took one that was not in its distribution)."""

    def __init__(self, context: Context, max_tokens: int, options: TokenOptions) -> None:
        """ArgumentError if an option is out of range, unknown, or at odds with another."""
        self._context = context
        self._model = model = context.model
        check_names(options, TokenOptions.__optional_keys__)
        stop = options.get("stop")
        self._stop = check_stop(model.eos_tokens if stop is None else stop)
        self._sampler = options.get("sampler")
        self._constraint = options.get("constraint")
        self._k = self._entries(options.get("k"))
        self._wants_logprobs = bool(options.get("logprobs", False))
        self._sampling = check_sampling(_only(options, Sampling.__optional_keys__))
        self._check_functions()
        commands = model.runtime.startup.limits.commands
        looks = self._sampler is not None or self._constraint is not None
        self._chain = 1 if looks else min(CHAIN_STEPS, commands // (2 * _COMMANDS_A_STEP)) or 1
        self._left = max_tokens  # not queued yet
        self._position = len(context)  # of the next token to queue
        self._steps: deque[Future[Any]] = deque()  # queued, not looked at yet
        self._history: History | None = None
        self._mask: bytes | None = None  # of the step that was queued last
        self.generated: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self.started = self.first_at = self.last_at = 0.0  # seconds of the monotonic clock

    def __next__(self) -> int:
        step = self._next_step()
        if step is None:
            raise StopIteration
        try:
            step.result()
        except InferletError:
            self._fail()
            raise
        if (token := self._accepted(step)) is None:
            raise StopIteration
        return token

    async def __anext__(self) -> int:
        step = self._next_step()
        if step is None:
            raise StopAsyncIteration
        try:
            await step
        except InferletError:
            self._fail()
            raise
        if (token := self._accepted(step)) is None:
            raise StopAsyncIteration
        return token

    def ahead(self) -> None:
        """Queues what comes next, without waiting for it: several generations that are asked for
        it in turn run together. Raises what a constraint raises."""
        self._next_step()

    def close(self, reason: FinishReason = "closed") -> None:
        """Ends the generation after the last token returned; nothing if it has ended."""
        if self.finish_reason is None:
            steps = list(self._steps)
            self._finish(reason)
            # before the first token there is a prompt on its way, and one step is soon done
            self._context.abandon(steps, cancel=bool(self.generated) and self._chain > 1)

    # --- steps ------------------------------------------------------------------------------

    def _next_step(self) -> Future[Any] | None:
        """The step whose token comes next, or None at the end."""
        if self.finish_reason is not None:
            return None
        if self._left and len(self._steps) <= self._chain // 2:
            if self._constraint is not None and not self._constrained():
                return None
            try:
                self._queue_steps()
            except InferletError:
                self._fail()
                raise
        if not self._steps:
            self._finish("length")
            return None
        return self._steps[0]

    def _queue_steps(self) -> None:
        count = min(self._left, self._chain)
        context, cache = self._context, self._context.cache
        tokens = context.all_tokens
        if not self.started:
            self.started = time.monotonic()
            if penalizes(self._sampling):
                # only the repetition penalty looks at a prompt
                prompt = tokens if self._sampling["repetition_penalty"] != 1.0 else ()
                self._history = cache.queue.alloc_history(prompt)
        begun = bool(self._steps or self.generated)
        if self.generated:
            cache.slide(len(tokens))
        if self._sampler is not None:
            self._steps.append(cache.distribution(tokens, self._k))
        else:
            last = count == self._left
            lazy = self._chain == CHAIN_STEPS  # half of fewer would be held back
            if not begun:
                self._steps.append(cache.first_step(tokens, self._draw))
            ahead = count if begun else count - 1
            at = self._position + count - ahead - 1
            self._steps += cache.steps(at, ahead, self._draw, lazy=lazy, last=last)
        self._position += count
        self._left -= count

    def _draw(self, out: Embeds, *, lazy: bool, rebind: Token | None) -> Token:
        return self._context.cache.queue.sample(
            out,
            stop=self._stop,
            lazy=lazy,
            rebind=rebind,
            mask=self._mask,
            history=self._history,
            logprobs=self._wants_logprobs,
            **self._sampling,
        )

    def _constrained(self) -> bool:
        """Asks the constraint for the next token's mask. False: it has nothing more to allow."""
        assert self._constraint is not None
        try:
            allowed = self._constraint(list(self.generated))
            if allowed is not END:
                self._mask = packed_mask(allowed, self._model.vocab_size, len(self.generated))
                return True
        except BaseException:
            self._finish("error")
            raise
        self._finish("stop")
        return False

    def _accepted(self, step: Future[Any]) -> int | None:
        """The token of `step`, which has been answered; None at the end."""
        if self._sampler is None:
            token = step.result()
            if self._wants_logprobs:
                assert isinstance(step, Token)
                logprob = step.logprob
        else:
            token, logprob = self._chosen(step.result())
        if token is None or token in self._stop:
            self._context.stopped()  # the steps queued behind it answer None and nobody waits
            self._finish("stop")
            return None
        self._steps.popleft()
        self.last_at = time.monotonic()
        if not self.generated:
            self.first_at = self.last_at
        self.generated.append(token)
        if self._wants_logprobs:
            self.logprobs.append(math.nan if logprob is None else logprob)
        self._context.keep(token)
        return int(token)

    def _chosen(self, distribution: Distribution) -> tuple[int | None, float | None]:
        """What the sampler takes of what the constraint leaves of `distribution`, and its
        log-probability if it is in there."""
        assert self._sampler is not None
        ids, probs, mask = distribution.ids, distribution.probs, self._mask
        try:
            token = self._sampler(distribution if mask is None else restricted(distribution, mask))
            if token is not None:
                most = self._model.vocab_size - 1
                token = integer("the sampler's token", token, most, f"0 to {most}, or None to end")
                if mask is not None and not mask[token >> 3] >> (token & 7) & 1:
                    raise ArgumentError(
                        f"the sampler's token is {token}, which the constraint does not allow",
                        "give one of the ids that the sampler gets, or None to end",
                    )
        except BaseException:
            self._context.stopped()
            self._finish("error")
            raise
        prob = 0.0 if token is None else float(probs[ids == token].sum())
        return token, math.log(prob) if prob > 0 else None

    # --- the end ----------------------------------------------------------------------------

    def _fail(self) -> None:
        self._finish("error")
        self._context.restart()

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self._steps.clear()
        self._history = None  # which frees it
        self._context.stream_ended()

    # --- checks -----------------------------------------------------------------------------

    def _entries(self, k: int | None) -> int:
        """How many tokens a sampler chooses from."""
        vocabulary, top_k = self._model.vocab_size, self._model.runtime.startup.limits.top_k
        if k is None:
            return min(_SAMPLER_TOKENS, vocabulary, top_k)
        if self._sampler is None:
            raise ArgumentError(f"k is {k}, and there is no sampler", "give sampler=, or leave it")
        entries = min(integer("k", k, U32_MAX, f"1 to {top_k}", least=1), vocabulary)
        return integer("k", entries, top_k, f"1 to {top_k}")

    def _check_functions(self) -> None:
        for name, function in (("sampler", self._sampler), ("constraint", self._constraint)):
            if function is not None and not callable(function):
                raise wrong_type(name, function, "a function")
        if self._sampler is None:
            return
        off = check_sampling({}).items()
        if other := [name for name, value in off if self._sampling.get(name) != value]:
            raise ArgumentError(
                f"there is a sampler, and {', '.join(other)} for another way to draw",
                "let the sampler do it",
            )


def check_names(options: Mapping[str, object], known: Collection[str]) -> None:
    """ArgumentError if there is an option that is not one of `known`."""
    for name in options:
        if name not in known:
            raise ArgumentError(
                f"there is no option {name!r} here", "use " + ", ".join(sorted(known))
            )


def _only(options: Mapping[str, object], names: Collection[str]) -> Sampling:
    return cast("Sampling", {name: value for name, value in options.items() if name in names})


class TextStream(Iterator[str], AsyncIterator[str]):
    """Text of one generation, in pieces of whole characters; no piece is empty."""

    def __init__(
        self,
        tokens: TokenStream,
        decoder: StreamDecoder,
        stop_strings: Sequence[str] = (),
        stop_when: Callable[[str], bool] | None = None,
    ) -> None:
        self.tokens = tokens
        self._decoder = decoder
        self._stop_strings = _check_stop_strings(stop_strings)
        if stop_when is not None and not callable(stop_when):
            raise wrong_type("stop_when", stop_when, "a function of the text so far")
        self._stop_when = stop_when
        self._text = ""  # all of it, for stop_when
        self._held = ""  # may be the beginning of a stop string

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while it goes on, then `stop`, `length`, `closed` (left early) or `error`."""
        return self.tokens.finish_reason

    @property
    def logprobs(self) -> list[float]:
        """Those of the tokens so far, if `logprobs` was asked for: see `TokenStream`."""
        return self.tokens.logprobs

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

    def ahead(self) -> None:
        """Queues what comes next without waiting for it: see `TokenStream.ahead`."""
        self.tokens.ahead()

    def close(self) -> None:
        """Ends the generation after the last piece returned; nothing if it has ended."""
        self.tokens.close()

    def _piece(self, text: str) -> str:
        """What of `text` can be told to be before any stop string."""
        if not self._stop_strings and self._stop_when is None:
            return text
        new, text = text, self._held + text
        found = [at for stop in self._stop_strings if (at := text.find(stop)) >= 0]
        if found or (new and self._stops(new)):
            self.tokens.close("stop")
            self._held, self._stop_strings = "", []
            self._decoder.reset()
            return text[: min(found)] if found else text
        longest = max(map(len, self._stop_strings), default=0)
        length = next(
            (
                length
                for length in range(min(len(text), longest), 0, -1)
                if any(stop.startswith(text[-length:]) for stop in self._stop_strings)
            ),
            0,
        )
        cut = len(text) - length
        self._held = text[cut:]
        return text[:cut]

    def _stops(self, new: str) -> bool:
        """Whether the program wants to end behind `new`."""
        if self._stop_when is None:
            return False
        self._text += new
        try:
            return bool(self._stop_when(self._text))
        except BaseException:
            self.tokens.close("error")
            raise

    def _rest(self) -> str:
        """What was held back, at the end."""
        rest, self._held = self._held + self._decoder.finish(), ""
        return rest


def _check_stop_strings(stop_strings: Sequence[str]) -> list[str]:
    valid = "a list of texts"
    if isinstance(stop_strings, str | bytes) or not isinstance(stop_strings, Sequence):
        raise wrong_type("stop_strings", stop_strings, valid)
    for text in stop_strings:
        if not isinstance(text, str):
            raise wrong_type("a stop string", text, valid)
    return [text for text in stop_strings if text]
