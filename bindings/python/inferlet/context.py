"""A context: tokens, their keys and values, and what is generated from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack, cast, overload

from . import saved
from .cache import KvCache, Window
from .checks import integer, out_of_range, wrong_type
from .errors import ArgumentError, HandleError, InferletError, PositionError
from .future import Future, gather
from .generation import TextOptions, TextStream, TokenOptions, TokenStream, check_names
from .scope import Scoped

if TYPE_CHECKING:
    from .model import Model

MAX_HIDDEN = 500  # ranges of hidden tokens; a forward reads at most 1,024 spans


@dataclass(frozen=True, slots=True)
class Stats:
    """What a context has done, and holds."""

    prompt_tokens: int  # filled in or restored, whatever was trimmed since
    generated_tokens: int  # in all generations, whatever was trimmed since; a fork counts on
    pages: int  # held, in KV pages
    shared_pages: int  # of these, those that a fork or a saved context may hold as well
    first_token_seconds: float | None  # of the latest generation, from its first step
    tokens_per_second: float | None  # of the latest generation, behind its first token


class Context(Scoped):
    """Tokens that can be extended, generated from, forked, trimmed, hidden and saved. Each has its
    own queue. Token i is at position i, whatever is hidden. `with` and `async with` close it.

    After a call on the queue has failed the context is usable again: it gives back what it held,
    and computes again, when asked, what is not evicted, attending to what is then visible.
    """

    def __init__(self, model: Model, prompt: str | Sequence[int] | None = None) -> None:
        """Raises what `fill` raises."""
        self.model = model
        self.cache = KvCache(model)
        self.all_tokens: list[int] = []
        self._prompt_tokens = self._generated_tokens = 0
        self._stream: TokenStream | None = None  # that goes on
        self._latest: TokenStream | None = None
        if prompt is not None:
            self.fill(prompt)

    def close(self) -> None:
        """Gives everything back now. Its tokens and text can still be read."""
        self.cache.close()

    def _leave(self) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.all_tokens)

    @property
    def tokens(self) -> list[int]:
        """Every token so far, those of the prompt included; a copy."""
        return list(self.all_tokens)

    @property
    def text(self) -> str:
        """The text of `tokens`."""
        return self.model.detokenize(self.all_tokens)

    @property
    def hidden(self) -> list[tuple[int, int]]:
        """The tokens that are masked or evicted, as ranges (first, end)."""
        return list(self.cache.hidden)

    @property
    def stats(self) -> Stats:
        """Counts so far; waits for nothing."""
        slots, latest = self.cache.slots, self._latest
        first = speed = None
        if latest is not None and latest.generated:
            first = latest.first_at - latest.started
            seconds = latest.last_at - latest.first_at
            speed = (len(latest.generated) - 1) / seconds if seconds else None
        return Stats(
            self._prompt_tokens,
            self._generated_tokens,
            slots.pages,
            slots.shared_pages,
            first,
            speed,
        )

    # --- tokens -----------------------------------------------------------------------------

    def fill(self, more: str | Sequence[int]) -> None:
        """Appends a text or token ids. A text is tokenized, which waits for the controller, with
        the tokenizer's own begin token if the context is empty.

        Nothing runs before it is needed. PositionError if the model's context cannot hold it;
        ArgumentError if an id is not in the vocabulary, or the text is longer than 32,768 octets.
        """
        if isinstance(more, bytes | bytearray):
            raise ArgumentError("a prompt of bytes", "decode() it: text is str, tokens are ints")
        if not isinstance(more, Iterable):
            raise wrong_type("the prompt", more, "a text or a list of token ids")
        self._settle()
        if isinstance(more, str):
            more = self.model.tokenize(more, special=not self.all_tokens).result()
        given: list[Any] = [more] if isinstance(more, Mapping) else list(more)
        if given and isinstance(given[0], Mapping):
            raise ArgumentError(
                "a prompt of dicts, which are chat messages and no tokens",
                "use chat(messages) of the context: it puts them into the model's template",
            )
        most = self.model.vocab_size - 1
        valid = f"ids from 0 to {most}: the vocabulary has {most + 1} tokens"
        tokens = [integer("a token", token, most, valid) for token in given]
        total, most = len(self.all_tokens) + len(tokens), self.model.max_context
        if total > most:
            raise PositionError(
                f"the context would have {total} tokens, {self.model.name} holds {most}",
                f"leave out {total - most} tokens, or serve a model with a longer context",
            )
        self.all_tokens += tokens
        self._prompt_tokens += len(tokens)

    def append(self, token: int) -> None:
        """Appends one token id. Raises what `fill` raises."""
        self.fill([token])

    def chat(self, messages: Sequence[Mapping[str, Any]], generation_prompt: bool = True) -> None:
        """Appends `messages` in the model's own chat template, and the beginning of its turn.
        Waits for the controller. Raises what `Model.chat` and `fill` raise."""
        self.fill(self.model.chat(messages, generation_prompt).result())

    def trim(self, length: int) -> None:
        """Keeps the first `length` tokens and frees the pages of the others. What is hidden of
        those that are kept stays hidden. ArgumentError if there are not so many."""
        self._settle()
        have = len(self.all_tokens)
        length = integer("the length to keep", length, have, f"0 to {have}")
        del self.all_tokens[length:]
        self.cache.trim(length)

    def rewind(self, count: int) -> None:
        """Takes the last `count` tokens away: see `trim`."""
        have = len(self.all_tokens)
        self.trim(have - integer("the tokens to take away", count, have, f"0 to {have}"))

    # --- attention --------------------------------------------------------------------------

    def mask(self, first: int, end: int, visible: bool = False) -> None:
        """Hides the tokens from `first` to before `end` from those that come after this call, or
        shows them again. What is computed keeps what it has seen, but for the last token, which is
        computed with what comes next; a token always sees itself. Shared pages can be masked too:
        a fork of this context is not changed.

        ArgumentError if there are no such tokens, if some to show again were evicted, or if the
        hidden ones lie in more than 500 ranges.
        """
        self._change_sight(first, end)
        cache = self.cache
        if visible:
            if gone := cache.evicted.within(first, end):
                raise ArgumentError(
                    f"tokens {gone[0][0]} to {gone[0][1] - 1} were evicted, and are not kept",
                    "use mask instead of evict for what is to be shown again",
                )
            cache.hidden.remove(first, end)
        else:
            self._check_room(first, end)
            cache.hidden.add(first, end)

    def evict(self, first: int, end: int) -> None:
        """`mask` for ever, and the pages that hold no other tokens are free for others. The tokens
        stay in `tokens` and keep their positions. Raises what `mask` raises."""
        self._change_sight(first, end)
        self._check_room(first, end)
        self.cache.evict(first, end)

    def window(self, sink: int = 4, recent: int | None = 1024) -> None:
        """From now on a token that is generated sees the first `sink` tokens, the `recent` ones
        before it, and itself; what falls out of that is evicted (StreamingLLM: Xiao et al. 2023).
        What is filled in sees all that is left. `recent=None`: no window any more.

        Positions stay absolute: a window bounds memory, not length, so the model's `max_context`
        ends a text as it would without. ArgumentError if a number is out of range.
        """
        self._settle()
        most = self.model.max_context
        sinks = integer("sink", sink, most, f"0 to {most}")
        if recent is None:
            self.cache.window = None
        else:
            self.cache.window = Window(sinks, integer("recent", recent, most, f"1 to {most}", 1))

    def _change_sight(self, first: int, end: int) -> None:
        """What is there now is computed, all but the last token, before what is visible changes."""
        self._settle()
        have = len(self.all_tokens)
        integer("the first token", first, have, f"0 to {have}")
        integer("the end of the range", end, have, f"{first} to {have}", least=first)
        if have:
            self.cache.write(self.all_tokens, have - 1)
            self.cache.written = have - 1

    def _check_room(self, first: int, end: int) -> None:
        touches = len(self.cache.hidden.within(first - 1, end + 1))
        ranges = len(self.cache.hidden) - touches + 1
        if ranges > MAX_HIDDEN:
            raise out_of_range("the number of hidden ranges", ranges, f"at most {MAX_HIDDEN}")

    # --- generation -------------------------------------------------------------------------

    def generate(self, max_tokens: int = 256, **options: Unpack[TextOptions]) -> TextStream:
        """The continuation, piece by piece, for `for` and `async for`; greedy unless `options` say
        else: `temperature`, `top_k`, `top_p`, `min_p`, `seed`, `bias`, `repetition_penalty`,
        `presence_penalty`, `frequency_penalty` (see `Sampling`), `logprobs`, `sampler`, `k` and
        `constraint` (see `TokenOptions`).

        Ends after `max_tokens` tokens, at the end of the model's context, before a token of
        `stop` (None: the model's end tokens), before one of `stop_strings`, or behind the piece
        with which `stop_when`, asked with all text so far, is true. A stop token is not part of
        the context; the tokens of a stop string are. Leaving the loop early is fine: the context
        then ends with the last token whose text was reached. The repetition penalty looks at all
        tokens, the other two at those of this generation.

        ArgumentError if an option is out of range or the context is empty; PositionError if it is
        full; while iterating, what the forward pass fails with, MaskError if the constraint allows
        nothing, or none of the `k` tokens that a sampler gets, and what the program's own
        functions raise.
        """
        check_names(options, TextOptions.__optional_keys__)
        strings, stop_when = options.pop("stop_strings", ()), options.pop("stop_when", None)
        tokens = self.generate_tokens(max_tokens, **cast("TokenOptions", options))
        return TextStream(tokens, self.model.stream_decoder(), strings, stop_when)

    def generate_tokens(
        self, max_tokens: int = 256, **options: Unpack[TokenOptions]
    ) -> TokenStream:
        """`generate`, but token ids."""
        self._settle()
        if not self.all_tokens:
            raise ArgumentError("the context is empty", "fill it with a prompt first")
        room = self.model.max_context - len(self.all_tokens)
        if not room:
            raise PositionError(
                f"the context is full: {len(self.all_tokens)} tokens, all that "
                f"{self.model.name} holds",
                "trim it, or serve a model with a longer context",
            )
        count = integer("max_tokens", max_tokens, 1 << 31, "1 or more", least=1)
        self._stream = self._latest = TokenStream(self, min(count, room), options)
        return self._stream

    # --- branches ---------------------------------------------------------------------------

    @overload
    def fork(self) -> Context: ...
    @overload
    def fork(self, n: int) -> list[Context]: ...
    def fork(self, n: int | None = None) -> Context | list[Context]:
        """A context with the same tokens, masks and window; with `n`, a list of that many. Full
        pages are shared, the last one is copied, so a fork costs at most one page. Waits for what
        is queued on this context. ArgumentError if n is below 1."""
        count = 1 if n is None else integer("n", n, 256, "1 to 256", least=1)
        self._settle()
        self.cache.write(self.all_tokens, len(self.all_tokens) - 1)
        self._wait_for(self.cache.queue.synchronize())
        forks = []
        for _ in range(count):
            child = Context(self.model)
            self.cache.fork_into(child.cache)
            child.all_tokens = list(self.all_tokens)
            child._prompt_tokens = self._prompt_tokens
            child._generated_tokens = self._generated_tokens
            forks.append(child)
        try:  # only then may the pages here change
            gather(*[fork.cache.queue.synchronize() for fork in forks]).result()
        except InferletError:
            for fork in forks:
                fork.close()
            raise
        return forks[0] if n is None else forks

    def join(self, branch: Context) -> None:
        """This context goes on as `branch` (a fork of it, say): takes its tokens, pages, masks and
        window, and frees its own. `branch` is closed. To keep this one's own and only append what
        another has to say, `fill` it with tokens of that. ArgumentError if `branch` is this
        context or one of another model."""
        if not isinstance(branch, Context) or branch is self:
            raise wrong_type("the branch", branch, "another context")
        if branch.model.index != self.model.index:
            raise ArgumentError(
                f"the branch is of {branch.model.name}, this context of {self.model.name}",
                "fill this one with the text of the other",
            )
        self._settle()
        branch._settle()
        self.cache, branch.cache = branch.cache, self.cache
        branch.close()
        self.all_tokens = list(branch.all_tokens)
        self._prompt_tokens = branch._prompt_tokens
        self._generated_tokens = branch._generated_tokens
        self._latest = branch._latest

    # --- saved contexts ---------------------------------------------------------------------

    def save(self, name: str, lease: float | None = None) -> None:
        """Saves this context as `name`, for every inferlet of the user, in any language, until
        this inferlet ends, or, with a `lease`, that many seconds after it was last saved or
        restored. Waits until that is done. Its pages are shared from then on; nothing is copied.

        ArgumentError if the name is in use, the context is empty, or tokens are masked or evicted,
        which a saved context cannot tell; QuotaError beyond the user's `export_pages`.
        """
        self._settle()
        if not self.all_tokens:
            raise ArgumentError("the context is empty", "fill it before you save it")
        if hidden := self.hidden:
            raise ArgumentError(
                f"tokens {hidden[0][0]} to {hidden[0][1] - 1} are hidden, and a saved context "
                "has no masks",
                "save it before, or show them again: mask(first, end, visible=True)",
            )
        self.cache.write(self.all_tokens, len(self.all_tokens))
        self._wait_for(self.cache.queue.synchronize())
        saved.save(self.cache, self.all_tokens, name, lease)

    @classmethod
    def restore(cls, model: Model, name: str) -> Context:
        """A context that was saved as `name`; its lease begins anew. Waits. NotFoundError if there
        is none, ArgumentError if it is no saved context or of another model, QuotaError if it has
        more pages than this inferlet may hold."""
        context = cls(model)
        try:
            context.all_tokens = saved.restore(context.cache, name)
        except BaseException:
            context.close()
            raise
        context._prompt_tokens = len(context.all_tokens)
        return context

    # --- for the streams --------------------------------------------------------------------

    def keep(self, token: int) -> None:
        """The generation reached `token`."""
        self.all_tokens.append(token)
        self.cache.written = len(self.all_tokens) - 1
        self._generated_tokens += 1

    def stopped(self) -> None:
        """The generation ended before a stop token, so the token before that was written."""
        self.cache.written = len(self.all_tokens)

    def stream_ended(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None and stream.generated:
            self.cache.slide(len(self.all_tokens))

    def abandon(self, steps: Sequence[Future[Any]], *, cancel: bool) -> None:
        """Drops the steps of a generation that nobody waits for any more."""
        try:
            self.cache.abandon(steps, cancel=cancel)
        except InferletError:
            self.restart()

    def restart(self) -> None:
        """After an error: what was computed is gone, and is computed again when asked."""
        self.cache.restart()

    def _wait_for(self, future: Future[None]) -> None:
        try:
            future.result()
        except InferletError:
            self.restart()
            raise
        self.cache.prefilled()

    def _settle(self) -> None:
        """Ends a generation that was left early. HandleError if the context was closed."""
        if self.cache.queue.destroyed:
            raise HandleError("the context was closed", "use it inside its `with` block")
        if self._stream is not None:
            self._stream.close()
