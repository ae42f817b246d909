"""The explicit calls, with the names of Pie (SOSP'25, Table 1 and section 4.2), on a queue.

Every call queues a command and returns at once. An error stops the queue: the futures of later
commands fail with it, until `synchronize` has reported it (`docs/abi.md` section 5).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeVar, Unpack

from .abi import (
    AllocEmb,
    AllocKvPage,
    Cancel,
    Command,
    CopyKvPage,
    CreateQueue,
    DeallocKvPage,
    DestroyQueue,
    EmbedTxt,
    Forward,
    GetNextDist,
    Index,
    MaskKvPage,
    Sample,
    SetQueuePriority,
    ShareKvPage,
    Synchronize,
)
from .errors import ArgumentError, HandleError, InferletError, MaskError, PositionError, SpanError
from .future import Future, nothing
from .ring import Distribution
from .sampling import Sampling, Token, check_sampling, check_stop
from .spans import Embeds, EmbedsHandle, KvHandle, KvSpan, TokenHandle

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

    from .model import Model

F = TypeVar("F", bound=Future[Any])

_EMBED_CHUNK = 4096  # tokens an embed_txt command carries: at most 10 octets each, of 64 Ki
_MAX_POSITION = 0x7FFFFFFF
_MAX_TOKEN = 0x7FFFFFFF
_U32_MAX = 0xFFFFFFFF


class Queue:
    """Commands in order, each as if carried out before the next; `with` destroys it at the end.

    Destroying it cancels what has not run and frees every page, embed and token made through it.
    """

    def __init__(self, model: Model) -> None:
        """create_queue."""
        self.model = model
        self.runtime = model.runtime
        self.destroyed = False
        self._connection = self.runtime.connection
        self._number = self.runtime.new_handle()
        self._confirmed = self._number  # handles up to this one are covered by a synchronize
        self._doubtful: list[range] = []  # those among which an allocation may have failed
        self._connection.append(CreateQueue(None, self._number, model.index))

    def __enter__(self) -> Queue:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.destroy()

    def __del__(self) -> None:
        if hasattr(self, "_doubtful"):  # false if the constructor raised
            self.destroy()

    def destroy(self) -> None:
        """destroy_queue, behind what is queued so far; nothing if it was destroyed already."""
        if not self.destroyed:
            self.destroyed = True
            self._connection.release(DestroyQueue(None, self._number))

    @property
    def number(self) -> int:
        """The queue on the wire. HandleError once it is destroyed."""
        if self.destroyed:
            raise HandleError("the queue was destroyed", "use it inside its `with` block")
        return self._number

    def release(self, number: int, dealloc: Command) -> None:
        """Queues `dealloc` of the handle `number`; called by finalizers."""
        self._connection.release(dealloc)
        if any(number in numbers for numbers in self._doubtful):
            # it may not exist, and that error must not stop the queue
            self._connection.release(
                Synchronize(None, self._number), Future(self._connection, nothing)
            )

    def doubt(self, handles: range) -> None:
        """Some of `handles` may never have been made, because a command failed or was dropped."""
        if self._doubtful and self._doubtful[-1].stop == handles.start:
            self._doubtful[-1] = range(self._doubtful[-1].start, handles.stop)
        else:
            self._doubtful.append(handles)

    def _unconfirmed(self) -> range:
        """Handles made since this was last asked."""
        first, self._confirmed = self._confirmed + 1, self.runtime.last_handle
        return range(first, self._confirmed + 1)

    # --- the queue itself ------------------------------------------------------------------

    def synchronize(self) -> Future[None]:
        """Resolves when everything queued so far was carried out, or with the error that stopped
        the queue; then the queue goes on."""
        return self._ask(Synchronize(None, self.number), _Synchronized(self, self._unconfirmed()))

    def set_queue_priority(self, priority: int) -> None:
        """-8 to 7, higher goes first, 0 at first; at once. ArgumentError if out of range."""
        if not -8 <= priority <= 7:
            raise ArgumentError(f"the priority is {priority}", "use -8 to 7")
        self._connection.append(SetQueuePriority(None, self.number, priority))

    def cancel(self) -> None:
        """Drops, at once, what the accelerator has not begun: those futures fail with
        CancelledError, and the queue goes on."""
        self._connection.append(Cancel(None, self.number))
        self.doubt(self._unconfirmed())

    # --- allocate --------------------------------------------------------------------------

    def get_kvpage_size(self) -> int:
        """Slots of a KV page."""
        return self.model.page_size

    def alloc_kvpage(self, pages: int = 1) -> KvSpan:
        """`pages` new pages, as a span of all their slots. ArgumentError if fewer than 1; on the
        queue: QuotaError, OutOfMemoryError."""
        return self.alloc_kv(pages * self.model.page_size)

    def alloc_kv(self, slots: int) -> KvSpan:
        """As many new pages as `slots` slots need, as a span of exactly `slots`."""
        _check_count(slots, "slots")
        pages = -(-slots // self.model.page_size)
        handle = KvHandle(self, pages)
        self._connection.append(AllocKvPage(None, self.number, handle.number, pages))
        return KvSpan(handle, 0, slots)

    def alloc_emb(self, count: int = 1) -> Embeds:
        """`count` new embeds. ArgumentError if fewer than 1; on the queue: QuotaError."""
        _check_count(count, "embeds")
        handle = EmbedsHandle(self)
        self._connection.append(AllocEmb(None, self.number, handle.number, count))
        return Embeds(handle, 0, count)

    def dealloc_kvpage(self, kv: KvSpan) -> None:
        """Lets go of the pages that `kv` covers; their memory is free once no other handle holds
        them. SpanError if it does not begin at a page's first slot."""
        first, pages = self._pages(kv)
        handle = kv.handle
        if isinstance(handle, KvHandle) and pages == handle.pages:
            handle.free()
        else:
            self._connection.append(DeallocKvPage(None, self.number, handle.number, first, pages))

    def dealloc_emb(self, emb: Embeds) -> None:
        """Frees the whole handle that `emb` is a part of."""
        emb.handle.free()

    def dealloc_token(self, token: Token) -> None:
        """Frees the handle of a late-bound token; its value, once known, stays."""
        token.handle.free()

    def share_kvpage(self, kv: KvSpan) -> KvSpan:
        """A new handle for the pages that `kv` covers. Both can be read; a write into a page that
        two handles hold fails with SharedPageError. SpanError if it does not begin at a page."""
        first, pages = self._pages(kv)
        handle = KvHandle(self, pages)
        self._connection.append(
            ShareKvPage(None, self.number, handle.number, kv.handle.number, first, pages)
        )
        return KvSpan(handle, 0, len(kv))

    def copy_kvpage(self, source: KvSpan, target: KvSpan) -> None:
        """Copies slot by slot: keys, values, position, visible bit. On the queue: SpanError if
        the lengths differ."""
        self._connection.append(CopyKvPage(None, self.number, source.wire, target.wire))

    # --- forward ---------------------------------------------------------------------------

    def mask_kvpage(self, kv: KvSpan, visible: bool) -> None:
        """Hides the slots of `kv` from attention, or shows them again."""
        self._connection.append(MaskKvPage(None, self.number, kv.wire, bool(visible)))

    def embed_txt(
        self,
        tokens: Sequence[SupportsIndex | Token],
        positions: int | Sequence[int] = 0,
        into: Embeds | None = None,
    ) -> Embeds:
        """Embeds `tokens` (ids, or late-bound tokens before their value is known).

        `positions` is that of the first token, the others following it, or one for each. They go
        to `into` if given, else to new embeds. PositionError and ArgumentError if a number is out
        of range; on the queue: HandleError, PositionError, ArgumentError.
        """
        refs = [_token_ref(token) for token in tokens]
        if into is None:
            into = self.alloc_emb(len(refs))
        elif len(into) != len(refs):
            raise SpanError(
                f"{len(refs)} tokens do not go into {len(into)} embeds", "slice one of them"
            )
        where: int | list[int]
        if not isinstance(positions, Iterable):
            where = _check_position(positions)
            _check_position(where + max(0, len(refs) - 1))
        else:
            where = [_check_position(position) for position in positions]
            if len(where) != len(refs):
                raise PositionError(
                    f"there are {len(where)} positions for {len(refs)} tokens",
                    "give one for each token, or only the first",
                )
        handle, number = into.handle.number, self.number
        for at in range(0, len(refs), _EMBED_CHUNK):
            end = at + _EMBED_CHUNK
            part = where + at if isinstance(where, int) else where[at:end]
            self._connection.append(
                EmbedTxt(None, number, (handle, into.first + at), refs[at:end], part)
            )
        return into

    def forward(
        self,
        inputs: Embeds,
        *,
        read: KvSpan | Iterable[KvSpan] = (),
        write: KvSpan | None = None,
        outputs: Embeds | int = 1,
        positions: Sequence[int] | None = None,
        mask: NDArray[np.bool_] | None = None,
    ) -> Embeds:
        """One forward pass over `inputs`, which attend to the slots of `read` and to each other.

        `write`, as long as `inputs`, receives their keys and values; None keeps none. `outputs`
        is how many of the last inputs become hidden states in place, or other embeds to put that
        many into; those embeds are returned. `positions` replace those of the embeds. `mask`,
        bool of shape (inputs, slots of `read` + inputs), decides alone who attends to what;
        MaskError if its shape is another. On the queue: every error of `docs/abi.md` section 9.
        """
        spans = [read] if isinstance(read, KvSpan) else list(read)
        spans = [span for span in spans if len(span)]
        if isinstance(outputs, int):
            if not 0 <= outputs <= len(inputs):
                raise SpanError(
                    f"{outputs} outputs of {len(inputs)} inputs", "ask for at most one an input"
                )
            outputs = inputs[len(inputs) - outputs :]
        self._connection.append(
            Forward(
                None,
                self.number,
                inputs.wire,
                [span.wire for span in spans],
                write.wire if write is not None else None,
                outputs.wire if len(outputs) else None,
                None if positions is None else [_check_position(p) for p in positions],
                None if mask is None else _pack_mask(mask, inputs, spans),
            )
        )
        return outputs

    # --- output ----------------------------------------------------------------------------

    def get_next_dist(self, emb: Embeds, k: int = 256) -> Future[Distribution]:
        """The k most probable tokens after `emb` (one hidden state), through the ring.

        `k` beyond the vocabulary gives the whole vocabulary. ArgumentError if k is not from 1 to
        `limits.top_k`, QuotaError if the ring is full; on the queue: UnwrittenError.
        """
        entries = min(k, self.model.vocab_size)
        top_k = self.runtime.startup.limits.top_k
        if not 1 <= entries <= top_k:
            raise ArgumentError(f"k is {k}, the limit is {top_k}", f"use 1 to {top_k}")
        place = self.runtime.ring.take(8 * entries)

        def read(written: int | None) -> Distribution:
            return Distribution.in_ring(place, written or 0)  # None: an earlier stop dropped it

        return self._ask(
            GetNextDist(None, self.number, _index(emb), entries, place.offset),
            Future(self._connection, read),
        )

    def sample(
        self,
        emb: Embeds,
        *,
        stop: Sequence[int] = (),
        lazy: bool = False,
        rebind: Token | None = None,
        **sampling: Unpack[Sampling],
    ) -> Token:
        """A token after `emb` (one hidden state), greedy unless `sampling` says else.

        A sampled token in `stop` drops what depends on it: later samples of the chain are None.
        `lazy` answers wait for each other, at most 16 of them and 0.4 s. `rebind` uses the
        handle of an earlier token again. ArgumentError if a parameter is out of range; on the
        queue: UnwrittenError, QuotaError.
        """
        index, valid, stop_tokens = _index(emb), check_sampling(sampling), check_stop(stop)
        handle = TokenHandle(self) if rebind is None else rebind.handle
        return self._connection.ask(
            Sample(
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
                lazy,
            ),
            Token(self._connection, handle),
        )

    def _ask(self, command: Command, future: F) -> F:
        return self._connection.ask(command, future)

    def _pages(self, kv: KvSpan) -> tuple[int, int]:
        """(first page, number of pages) of `kv` in its handle."""
        size = self.model.page_size
        if kv.first % size or not len(kv):
            raise SpanError(
                f"the span begins at slot {kv.first} and has {len(kv)} slots; "
                f"a page has {size} slots",
                "begin at a multiple of the page size",
            )
        return kv.first // size, -(-len(kv) // size)


class _Synchronized(Future[None]):
    """`synchronize`: if it reports an error, the handles made before are in doubt."""

    __slots__ = ("_made", "_queue")

    def __init__(self, queue: Queue, made: range) -> None:
        super().__init__(queue.runtime.connection, nothing)
        self._queue = queue
        self._made = made

    def fail(self, error: InferletError) -> None:
        self._queue.doubt(self._made)
        super().fail(error)


def _check_count(count: int, what: str) -> None:
    if not 1 <= count <= _U32_MAX:
        raise ArgumentError(f"{count} {what} were asked for", "ask for at least 1")


def _check_position(position: SupportsIndex) -> int:
    value = operator.index(position)
    if not 0 <= value <= _MAX_POSITION:
        raise PositionError(f"the position is {value}", "use 0 to the model's max_context - 1")
    return value


def _token_ref(token: SupportsIndex | Token) -> int:
    """A token id, or ~handle of a late-bound token."""
    if isinstance(token, Token):
        return ~token.handle.number
    value = operator.index(token)
    if not 0 <= value <= _MAX_TOKEN:
        raise ArgumentError(f"the token id is {value}", "use 0 to the vocabulary's size - 1")
    return value


def _index(emb: Embeds) -> Index:
    """The one embed of `emb` on the wire."""
    if len(emb) != 1:
        raise SpanError(f"one embed is needed, not {len(emb)}", "take one, such as out[-1]")
    return (emb.handle.number, emb.first)


def _pack_mask(mask: NDArray[np.bool_], inputs: Embeds, read: list[KvSpan]) -> bytes:
    """Rows of bits, least significant first, each padded to a whole octet."""
    shape = (len(inputs), sum(map(len, read)) + len(inputs))
    if mask.shape != shape:
        raise MaskError(
            f"the mask has shape {mask.shape}, {shape} is needed",
            "give a row for each input; a column for each slot read, then for each input",
        )
    import numpy as np  # only masks need it here, and it is slow to import

    return np.packbits(mask.astype(np.bool_), axis=1, bitorder="little").tobytes()
