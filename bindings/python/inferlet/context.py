"""A context: tokens, and their keys and values in KV pages, kept in step with each other.

Slot i holds token i at position i. Slots beyond `_written` may hold leftovers of a generation
that was given up; nothing reads them and later writes replace them. The last token is written
only when something comes after it, because its forward pass is what the next sample needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

from .errors import ArgumentError, InferletError, PositionError
from .generation import TextStream, TokenStream
from .queue import Queue
from .sampling import Sampling, Token
from .spans import Embeds, KvSpan

if TYPE_CHECKING:
    from types import TracebackType

    from .model import Model

MAX_INPUTS = 512  # of one forward: keeps others' decode steps short


class Context:
    """Tokens that can be extended, generated from, forked and trimmed. Each has its own queue."""

    def __init__(self, model: Model, prompt: str | Sequence[int] | None = None) -> None:
        """Raises what `fill` raises."""
        self.model = model
        self._queue = Queue(model)
        self._tokens: list[int] = []
        self._written = 0  # tokens whose keys and values are in the slots before it
        self._kv: list[KvSpan] = []  # whole pages of one handle each, in order
        self._shared_end = 0  # slots before it are in pages that another context may hold
        self._out: Embeds | None = None  # the embed that decode steps read and write
        self._late: Token | None = None  # its handle is rebound at every step
        self._stream: TokenStream | None = None
        if prompt is not None:
            self.fill(prompt)

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._queue.destroy()

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def tokens(self) -> list[int]:
        """Every token so far, those of the prompt included; a copy."""
        return list(self._tokens)

    @property
    def text(self) -> str:
        """The text of `tokens`."""
        return self.model.detokenize(self._tokens)

    def fill(self, more: str | Sequence[int]) -> None:
        """Appends a text or token ids. A text is tokenized, which waits for the controller, with
        the tokenizer's own begin token if the context is empty.

        Nothing runs before it is needed. PositionError if the model's context cannot hold it;
        ArgumentError if an id is not in the vocabulary.
        """
        if isinstance(more, bytes | bytearray):
            raise ArgumentError("a prompt of bytes", "decode() it: text is str, tokens are ints")
        self._settle()
        if isinstance(more, str):
            tokens = self.model.tokenize(more, special=not self._tokens).result()
        else:
            tokens = [int(token) for token in more]
        total, most = len(self._tokens) + len(tokens), self.model.max_context
        if total > most:
            raise PositionError(
                f"the context would have {total} tokens, {self.model.name} holds {most}",
                f"leave out {total - most} tokens, or serve a model with a longer context",
            )
        for token in tokens:
            if not 0 <= token < self.model.vocab_size:
                raise ArgumentError(
                    f"token {token} is not in the vocabulary of {self.model.vocab_size}",
                    f"use ids from 0 to {self.model.vocab_size - 1}",
                )
        self._tokens += tokens

    def append(self, token: int) -> None:
        """Appends one token id. Raises what `fill` raises."""
        self.fill([token])

    def generate(
        self,
        max_tokens: int = 256,
        *,
        stop: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        **sampling: Unpack[Sampling],
    ) -> TextStream:
        """The continuation, piece by piece, for `for` and `async for`; greedy unless `sampling`
        says else.

        Ends after `max_tokens` tokens, at the end of the model's context, before a token of
        `stop` (None: the model's end tokens), or before one of `stop_strings`. A stop token is
        not part of the context; the tokens of a stop string are. Leaving the loop early is fine:
        the context then ends with the last token whose text was reached.
        ArgumentError if a parameter is out of range or the context is empty; PositionError if it
        is full; while iterating, what the forward pass fails with.
        """
        tokens = self.generate_tokens(max_tokens, stop=stop, **sampling)
        return TextStream(tokens, self.model.stream_decoder(), stop_strings)

    def generate_tokens(
        self,
        max_tokens: int = 256,
        *,
        stop: Sequence[int] | None = None,
        **sampling: Unpack[Sampling],
    ) -> TokenStream:
        """`generate`, but token ids."""
        self._settle()
        if not self._tokens:
            raise ArgumentError("the context is empty", "fill it with a prompt first")
        room = self.model.max_context - len(self._tokens)
        if not room:
            raise PositionError(
                f"the context is full: {len(self._tokens)} tokens, all that "
                f"{self.model.name} holds",
                "trim it, or serve a model with a longer context",
            )
        if max_tokens < 1:
            raise ArgumentError(f"max_tokens is {max_tokens}", "use 1 or more")
        end_tokens = self.model.eos_tokens if stop is None else stop
        self._stream = TokenStream(self, min(max_tokens, room), end_tokens, sampling)
        return self._stream

    def fork(self) -> Context:
        """A context with the same tokens. Full pages are shared, the last one is copied, so a
        fork costs at most one page. Waits for what is queued on this context."""
        self._settle()
        self._write_until(len(self._tokens) - 1)
        try:
            self._queue.synchronize().result()
        except InferletError:
            self.restart()
            raise
        child = Context(self.model)
        child._tokens = list(self._tokens)
        child._written = min(self._written, max(0, len(self._tokens) - 1))
        size = self.model.page_size
        shared = child._written // size * size
        child._kv = [child._queue.share_kvpage(span) for span in self._slots(0, shared)]
        if shared < child._written:
            child._reserve(child._written)
            (source,) = self._slots(shared, child._written)
            (target,) = child._slots(shared, child._written)
            child._queue.copy_kvpage(source, target)
        child._shared_end = shared
        self._shared_end = max(self._shared_end, shared)
        child._queue.synchronize().result()  # only now may the pages here change
        return child

    def trim(self, length: int) -> None:
        """Keeps the first `length` tokens and frees the pages of the others. ArgumentError if
        there are not so many."""
        self._settle()
        if not 0 <= length <= len(self._tokens):
            raise ArgumentError(
                f"cannot keep {length} of {len(self._tokens)} tokens",
                f"keep 0 to {len(self._tokens)}",
            )
        del self._tokens[length:]
        self._written = min(self._written, length)
        self._cut(-(-length // self.model.page_size) * self.model.page_size)

    # --- for the streams -------------------------------------------------------------------

    def queue_steps(
        self,
        position: int,
        count: int,
        stop: Sequence[int],
        sampling: Sampling,
        *,
        first: bool,
        last: bool,
    ) -> list[Token]:
        """Queues `count` steps that sample the tokens from `position` on. `first` and `last`: with
        them a generation begins and ends. Each step but its first takes the token before it from
        the accelerator, not from here; the answers between its first and last may wait for each
        other."""
        queue = self._queue
        if self._out is None:
            self._out = queue.alloc_emb(1)
        if first:
            # the last token's hidden state is needed, so its forward pass runs (again)
            self._written = min(self._written, position - 1)
            self._unshare(self._written)
        end = position + count
        self._reserve(end - 1)
        out, steps = self._out, []
        for at in range(position, end):
            lazy = not (first and at == position) and not (last and at == end - 1)
            if first and at == position:
                self._write_until(at, out)
            elif self._late is not None:
                queue.embed_txt([self._late], at - 1, into=out)
                (slot,) = self._slots(at - 1, at)
                queue.forward(out, read=self._slots(0, at - 1), write=slot, outputs=out)
            self._late = queue.sample(out, stop=stop, lazy=lazy, rebind=self._late, **sampling)
            steps.append(self._late)
        return steps

    def keep(self, token: int) -> None:
        """The generation reached `token`."""
        self._tokens.append(token)
        self._written = len(self._tokens) - 1

    def stopped(self) -> None:
        """The generation ended before a stop token, so the token before that was written."""
        self._written = len(self._tokens)

    def stream_ended(self) -> None:
        self._stream = None

    def abandon(self, steps: Sequence[Token], begun: bool) -> None:
        """Drops the steps of a generation that nobody waits for any more. `begun` says that the
        first step was carried out, so that the prompt is written."""
        if begun:
            self._queue.cancel()
        for token in steps:
            try:
                token.result()
            except InferletError as error:
                if error.name != "cancelled":
                    self.restart()
                    return
        if begun:  # pages that the cancelled steps were to get may not have been allocated
            size = self.model.page_size
            self._cut(-(-self._written // size) * size)

    def restart(self) -> None:
        """After an error: gives everything back and computes again from the tokens when asked."""
        self._queue.destroy()
        self._kv, self._written, self._shared_end = [], 0, 0
        self._out = self._late = None
        with contextlib.suppress(InferletError):  # the connection may be gone
            self._queue = Queue(self.model)

    # --- slots -----------------------------------------------------------------------------

    def _settle(self) -> None:
        """Ends a generation that was left early."""
        if self._stream is not None:
            self._stream.close()

    def _write_until(self, end: int, output: Embeds | None = None) -> None:
        """Queues the forward passes of the tokens before `end` that are not written; the hidden
        state of the last goes to `output`."""
        if self._written >= end:
            return
        self._unshare(self._written)
        self._reserve(end)
        while (begin := self._written) < end:
            slots = self._slots(begin, min(end, begin + MAX_INPUTS))[0]  # within one handle
            self._written += len(slots)
            inputs = self._queue.embed_txt(self._tokens[begin : self._written], begin)
            outputs = output if output is not None and self._written == end else 0
            self._queue.forward(inputs, read=self._slots(0, begin), write=slots, outputs=outputs)

    def _slots(self, first: int, end: int) -> list[KvSpan]:
        """The slots from `first` to `end` as spans."""
        spans, base = [], 0
        for span in self._kv:
            if base >= end:
                break
            part = span[max(0, first - base) : max(0, end - base)]
            if len(part):
                spans.append(part)
            base += len(span)
        return spans

    def _reserve(self, slots: int) -> None:
        """Allocates pages for `slots` slots, and some more so that there are few handles."""
        held = sum(map(len, self._kv))
        if slots > held:
            size = self.model.page_size
            most = -(-self.model.max_context // size) * size - held
            grown = min(most, max(slots - held, held // 4))
            self._kv.append(self._queue.alloc_kvpage(-(-grown // size)))

    def _cut(self, slots: int) -> None:
        """Frees the pages beyond `slots`, a number of whole pages."""
        base, kept = 0, []
        for span in self._kv:
            if base + len(span) <= slots:
                kept.append(span)
            elif base < slots:
                self._queue.dealloc_kvpage(span[slots - base :])
                kept.append(span[: slots - base])
            base += len(span)
        self._kv = kept
        self._shared_end = min(self._shared_end, slots)

    def _unshare(self, slot: int) -> None:
        """Makes the page of `slot` this context's own before it is written."""
        if slot >= self._shared_end:
            return
        size = self.model.page_size
        page = slot // size * size
        old = self._slots(page, slot)
        own = self._queue.alloc_kvpage(1)
        if old:
            self._queue.copy_kvpage(old[0], own[: slot - page])
        self._cut(page)
        self._kv.append(own)
