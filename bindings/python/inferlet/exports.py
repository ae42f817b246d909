"""KV pages by name, shared with other inferlets of the same user (Pie, SOSP'25: export_kvpage,
import_kvpage)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .abi import (
    MAX_EXPORT_RANGES,
    MAX_META_BYTES,
    MAX_TOPIC_BYTES,
    ExportKvPage,
    ImportKvPage,
    ListExported,
    PageRange,
    UnexportKvPage,
)
from .checks import U32_MAX, bounded, name_of, number, out_of_range, text
from .errors import SpanError
from .future import Answer, Future, nothing
from .pages import PageCalls
from .runtime import runtime
from .series import Listing
from .spans import KvHandle, KvSpan


@dataclass(frozen=True, slots=True)
class Imported:
    """Pages of an export, shared: they can be read, and written by nobody."""

    kv: KvSpan  # all slots of the pages, those the exporter did not write included
    meta: bytes  # what the exporter gave with them


@dataclass(frozen=True, slots=True)
class Export:
    """An export as `list_exported` shows it."""

    name: str
    pages: int
    exporter: str  # the id of the inferlet that made it
    seconds_left: float | None  # of its lease; None: until the exporter ends


class ExportCalls(PageCalls):
    """Calls that share pages with other inferlets."""

    def export_kvpage(
        self,
        name: str,
        spans: KvSpan | Sequence[KvSpan],
        *,
        meta: str | bytes = b"",
        lease: float | None = None,
    ) -> Future[None]:
        """Shares the whole pages that `spans` cover, side by side, as `name`, with a `meta` (at
        most 60,000 octets) of the program's own, such as the tokens.

        From then on nobody may write into them. The export ends with this inferlet, or, with a
        `lease`, that many seconds after the latest export or import. ArgumentError if a parameter
        is out of range; SpanError if a span does not begin at a page, or one but the last does
        not end at one; on the queue: ArgumentError (the name is in use), QuotaError.
        """
        listed = [spans] if isinstance(spans, KvSpan) else list(spans)
        if not 1 <= len(listed) <= MAX_EXPORT_RANGES:
            raise out_of_range("the number of spans", len(listed), f"1 to {MAX_EXPORT_RANGES:,}")
        for span in listed[:-1]:
            if len(span) % self.model.page_size:
                raise SpanError(
                    f"a span of {len(span)} slots ends inside a page, and others follow it",
                    "let only the last span end inside a page",
                )
        ranges: list[PageRange] = []
        for span in listed:
            first, pages = self._pages(span)
            ranges.append((span.handle.number, first, pages))
        data = bounded("meta", meta, MAX_META_BYTES, "keep it in the store, and its key here")
        command = ExportKvPage(
            None, self.number, name_of("the name", name), ranges, data, _seconds(lease)
        )
        return self._connection.ask(command, Answer(self._connection, nothing))

    def import_kvpage(self, name: str) -> Future[Imported]:
        """The pages of the export `name`, shared, and what it carries; renews its lease.

        On the queue: NotFoundError (like every error it stops the queue until `synchronize`),
        QuotaError.
        """
        name_of("the name", name)
        handle = KvHandle(self, 0)
        command = ImportKvPage(None, self.number, handle.number, name)
        return self._connection.ask(command, _Import(self, handle))


def unexport_kvpage(name: str) -> Future[None]:
    """Ends the export `name`, whichever inferlet of the user made it. What was imported stays.
    NotFoundError if there is no such export."""
    command = UnexportKvPage(None, name_of("the name", name))
    return runtime.connection.ask(command, Answer(runtime.connection, nothing))


def list_exported(prefix: str = "") -> Listing[Export]:
    """The user's exports whose names begin with `prefix`, by name: all by `.result()` or `await`,
    or one by one by `for` and `async for`."""
    text("the prefix", prefix, MAX_TOPIC_BYTES)
    connection = runtime.connection

    def exports(value: Any) -> list[Export]:
        return [Export(*entry) for entry in value]

    def page(after: str) -> Future[list[Export]]:
        return connection.ask(ListExported(None, prefix, after), Answer(connection, exports))

    return Listing(page, lambda export: export.name)


class _Import(Answer[Imported]):
    """`import_kvpage`: the handle has its pages once it is answered, or was never made."""

    __slots__ = ("_handle",)

    def __init__(self, queue: ExportCalls, handle: KvHandle) -> None:
        super().__init__(queue.runtime.connection, self._imported)
        self._handle = handle

    def _imported(self, value: Any) -> Imported:
        self._handle.pages, meta = value
        slots = self._handle.pages * self._handle.queue.model.page_size
        return Imported(KvSpan(self._handle, 0, slots), meta)

    def fail(self, error: Exception) -> None:
        self._handle.forget()
        super().fail(error)


def _seconds(lease: float | None) -> int | None:
    """A lease as sent: whole seconds, rounded up."""
    if lease is None:
        return None
    seconds = number("the lease", lease, "seconds")
    if not 0 < seconds <= U32_MAX:
        raise out_of_range("the lease", seconds, "a number of seconds above 0, or None")
    return math.ceil(seconds)
