"""Model inputs: tokens and vectors into embeds (Pie, SOSP'25: InputText, InputEmbed)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, SupportsIndex

from .abi import EmbedTxt, WriteEmb
from .checks import positions as check_positions
from .errors import ArgumentError, SpanError
from .future import Answer
from .pages import PageCalls
from .ring import Place
from .sampling import TOKENS_A_COMMAND, Token, token_refs
from .spans import Embeds, check_span

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class InputCalls(PageCalls):
    """Calls that fill embeds."""

    def embed_txt(
        self,
        tokens: Iterable[SupportsIndex | Token],
        positions: SupportsIndex | Iterable[SupportsIndex] = 0,
        into: Embeds | None = None,
    ) -> Embeds:
        """Embeds `tokens` (ids, or late-bound tokens before their value is known).

        `positions` is that of the first token, the others following it, or one for each. They go
        to `into` if given, else to new embeds. PositionError and ArgumentError if a number is out
        of range; on the queue: HandleError, PositionError, ArgumentError.
        """
        refs = token_refs(tokens)
        where = check_positions(positions, len(refs), "tokens")
        into = self._target(into, len(refs), "tokens")
        handle, number = into.handle.number, self.number
        for at in range(0, len(refs), TOKENS_A_COMMAND):
            end = at + TOKENS_A_COMMAND
            part = where + at if isinstance(where, int) else where[at:end]
            self._connection.append(
                EmbedTxt(None, number, (handle, into.first + at), refs[at:end], part)
            )
        return into

    def write_emb(
        self,
        vectors: NDArray[np.floating[Any]],
        positions: SupportsIndex | Iterable[SupportsIndex] = 0,
        *,
        into: Embeds | None = None,
    ) -> Embeds:
        """Puts `vectors`, f32 of shape (n, hidden_size), into embeds as inputs for `forward`, in
        place of tokens' own embeddings. They are copied, once, into ring in; other floats are
        rounded to f32.

        `positions` and `into` are as of `embed_txt`. What `read_emb` gave comes back bit by bit.
        ArgumentError if the shape is another or a number is not finite, QuotaError if ring in is
        full of what is not answered yet; on the queue: TraitError, HandleError.
        """
        import numpy as np  # slow to import, and few programs need it

        try:
            array = np.ascontiguousarray(vectors, "<f4")
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"the vectors are no numbers: {error}", "give f32") from None
        width = self.model.hidden_size
        if array.ndim != 2 or array.shape[1] != width or not len(array):
            raise ArgumentError(
                f"the vectors have shape {array.shape}",
                f"give f32 of shape (n, {width}), n above 0",
            )
        if not np.isfinite(array).all():
            raise ArgumentError("the vectors have NaN or infinity in them", "give finite numbers")
        where = check_positions(positions, len(array), "vectors")
        place = self.runtime.ring_in.put(array.data.cast("B"))
        into = self._target(into, len(array), "vectors")
        command = WriteEmb(None, self.number, into.wire, place.offset, where)

        def written(value: object, place: Place = place) -> None:
            """Refers to the place, so that it is in use until then."""

        self._connection.ask(command, Answer(self._connection, written))
        return into

    def _target(self, into: Embeds | None, count: int, what: str) -> Embeds:
        """Where `count` of `what` go: `into`, or new embeds."""
        if into is None:
            return self.alloc_emb(count)
        if len(check_span(into, Embeds)) != count:
            raise SpanError(
                f"{count} {what} do not go into {len(into)} embeds", "slice one of them"
            )
        return into
