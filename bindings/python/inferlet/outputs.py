"""Model outputs: distributions, sampled tokens, hidden states (Pie, SOSP'25: OutputText,
OutputEmbed)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, SupportsIndex, Unpack

from .abi import GetNextDist, ReadEmb, Sample
from .checks import U32_MAX, integer, wrong_type
from .command_queue import CommandQueue
from .distribution import Distribution
from .errors import ArgumentError
from .future import Answer, Future
from .history import History
from .sampling import (
    Sampling,
    Token,
    check_sampling,
    check_stop,
    pack_token_mask,
    penalizes,
    token_refs,
)
from .spans import Embeds, TokenHandle, check_span

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class OutputCalls(CommandQueue):
    """Calls that read what `forward` made."""

    def get_next_dist(self, emb: Embeds, k: int = 256) -> Future[Distribution]:
        """The k most probable tokens after `emb` (one hidden state), through the ring.

        `k` beyond the vocabulary gives the whole vocabulary. ArgumentError if k is not from 1 to
        `limits.top_k`, QuotaError if the ring is full; on the queue: UnwrittenError.
        """
        entries = self._entries(k, least=1)
        index = check_span(emb, Embeds).index
        place = self.runtime.ring.place(8 * entries)

        def read(written: int | None) -> Distribution:
            return Distribution.in_ring(place, written or 0)  # None: an earlier stop dropped it

        command = GetNextDist(None, self.number, index, entries, place.offset)
        return self._connection.ask(command, Answer(self._connection, read))

    def sample(
        self,
        emb: Embeds,
        *,
        stop: Iterable[SupportsIndex] = (),
        lazy: bool = False,
        rebind: Token | None = None,
        mask: NDArray[np.bool_] | bytes | None = None,
        history: History | None = None,
        logprobs: bool = False,
        k: int = 0,
        **sampling: Unpack[Sampling],
    ) -> Token:
        """A token after `emb` (one hidden state), greedy unless `sampling` says else.

        A sampled token in `stop` drops what depends on it: later samples of the chain are None.
        `lazy` answers wait for each other, at most 16 of them and 0.4 s. `rebind` uses the
        handle of an earlier token again. `mask` says which tokens are allowed: bool of shape
        (vocab_size,), or its bits packed, least significant first. `history` is what the
        penalties look at; the token is added to it. `logprobs` asks for the token's logarithmic
        probability, `k` for the k most probable tokens as of `get_next_dist`, both by the model's
        own softmax: see `Token`.

        ArgumentError if a parameter is out of range or a penalty is given without a history,
        MaskError for a mask of another size or without a token, QuotaError if a ring is full; on
        the queue: UnwrittenError, QuotaError.
        """
        index = check_span(emb, Embeds).index
        valid, stop_tokens = check_sampling(sampling), check_stop(stop)
        entries = self._entries(k) if k else 0
        penalized = None
        if history is not None:
            if not isinstance(history, History):
                raise wrong_type("history", history, "what queue.alloc_history() gives")
            penalized = history.number
        elif sampling and penalizes(valid):
            raise ArgumentError(
                "a penalty needs a history to look at",
                "give history=queue.alloc_history(prompt)",
            )
        packed = None if mask is None else pack_token_mask(mask, self.model.vocab_size)
        place = None if packed is None else self.runtime.ring_in.put(packed)
        top = self.runtime.ring.place(8 * entries) if entries else None
        # last, because what was never made must not be freed
        handle = TokenHandle(self) if rebind is None else rebind.handle
        command = Sample(
            None,
            self.number,
            index,
            handle.number,
            valid["temperature"],
            valid["top_k"],
            valid["top_p"],
            valid["min_p"],
            valid["seed"],
            stop_tokens,
            bool(lazy),
            None if place is None else place.offset,
            list(valid["bias"].items()),
            penalized,
            valid["repetition_penalty"],
            valid["presence_penalty"],
            valid["frequency_penalty"],
            bool(logprobs),
            entries,
            0 if top is None else top.offset,
        )
        return self._connection.ask(command, Token(self._connection, handle, place, top))

    def alloc_history(self, prompt: Iterable[SupportsIndex | Token] = ()) -> History:
        """A history for the penalties of `sample`, with the tokens of a prompt. ArgumentError if
        one is no token id; on the queue: QuotaError."""
        return History(self, token_refs(prompt))

    def read_emb(self, embeds: Embeds) -> Future[NDArray[np.float32]]:
        """The vectors that `embeds` hold, f32 of shape (n, hidden_size): hidden states as `forward`
        left them, or the embeddings of tokens. A read-only view of the ring: its place is used
        again when no array looks into it. Shape (0, hidden_size) if an earlier stop dropped one.

        QuotaError if the ring has no room for them; on the queue: UnwrittenError, TraitError.
        """
        count, width = len(check_span(embeds, Embeds)), self.model.hidden_size
        if not count:
            raise ArgumentError("no embed is asked for", "give a span of at least one")
        place = self.runtime.ring.place(4 * count * width)

        def read(written: int | None) -> NDArray[np.float32]:
            return place.array(0, (written or 0, width), "<f4")

        command = ReadEmb(None, self.number, embeds.wire, place.offset)
        return self._connection.ask(command, Answer(self._connection, read))

    def _entries(self, k: SupportsIndex, least: int = 0) -> int:
        """How many entries of a distribution `k` asks for."""
        top_k = self.runtime.startup.limits.top_k
        entries = min(integer("k", k, U32_MAX, f"{least} to {top_k}", least), self.model.vocab_size)
        if entries > top_k:
            raise ArgumentError(f"k is {k}, the limit is {top_k}", f"use {least} to {top_k}")
        return entries
