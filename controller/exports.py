"""KV pages shared by name among the inferlets of one user.

An export holds references to its pages, so that they outlive the exporter's handles and, with a
lease, the exporter. Nobody writes into them meanwhile: each page has a second holder.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from inferlet import abi
from inferlet.errors import ArgumentError, NotFoundError, QuotaError

from .forward import kv_block
from .names import check_name
from .run import Run
from .seat import Seat, unused
from .tables import KvBlock

if TYPE_CHECKING:
    from .pools import PagePool

_MOST_META: Final = 16 << 20  # octets of `meta` that all exports of a user hold
_MOST_ANSWER: Final = 60000  # octets of one answer of `list_exported`


class Export:
    """Pages side by side; `regular`, `base` and `filled` are as in a KvBlock."""

    __slots__ = (
        "base",
        "expires",
        "exporter",
        "exporter_id",
        "filled",
        "lease",
        "meta",
        "name",
        "orphaned",
        "pages",
        "regular",
        "user",
    )

    def __init__(self, name: str, seat: Seat, meta: bytes, lease: int | None) -> None:
        self.name = name
        self.user = seat.user
        self.exporter = seat.number
        self.exporter_id = seat.id
        self.meta = meta
        self.lease = lease  # seconds; None: until the exporter ends
        self.expires = math.inf  # seconds, monotonic
        self.orphaned = False  # its exporter has ended
        self.pages = array("i")
        # What is known of the slots must hold for all times: while queues of the exporter have
        # steps in flight, which may write into these pages and may fail, only the device knows.
        self.regular = all(queue.flight is None for queue in seat.queues.values())
        self.base = 0
        self.filled = 0

    def append(self, block: KvBlock, first: int, pages: int) -> None:
        """Adds pages first .. first + pages - 1 of the block, and what is known of their slots."""
        at, skipped = len(self.pages) * block.page_size, first * block.page_size
        known = min(max(block.filled - skipped, 0), pages * block.page_size)
        if known:
            base = block.base + skipped - at
            if at == 0:
                self.base = base
            if not block.regular or self.filled != at or self.base != base:
                self.regular = False
            self.filled = at + known
        self.pages.extend(block.pages[first : first + pages])

    def seconds_left(self) -> float | None:
        return None if self.lease is None else max(0.0, self.expires - time.monotonic())


class Exports:
    """All exports, by user and name."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._users: dict[str, dict[str, Export]] = {}
        self._pages: dict[str, int] = {}  # that the exports of each user hold
        self._meta: dict[str, int] = {}  # octets
        self.next_expiry = math.inf  # no export expires before: seconds, monotonic
        self.handlers: dict[type[abi.Command], Callable[[Seat, Any], None]] = {
            abi.UnexportKvPage: self._unexport,
            abi.ListExported: self._list,
        }

    def pages(self, user: str) -> int:
        """How many pages the user's exports hold."""
        return self._pages.get(user, 0)

    def exporters(self) -> set[int]:
        """The seats that exports end with, or are kept from going first by."""
        return {e.exporter for e in self._all() if not e.orphaned}

    def find(self, user: str, name: str) -> Export:
        """NotFoundError; an ArgumentError for a name that is too long."""
        check_name(name)
        export = self._users.get(user, {}).get(name)
        if export is None or export.expires <= time.monotonic():
            raise NotFoundError(
                f"no export has the name {name!r}", "export_kvpage it first, or see list_exported"
            )
        return export

    def check(self, seat: Seat, name: str, pages: int, meta: bytes) -> None:
        """ArgumentError or QuotaError if `add` may not be done."""
        check_name(name)
        self.expire()
        if name in self._users.get(seat.user, ()):
            raise ArgumentError(
                f"an export has the name {name!r} already", "unexport_kvpage it, or use another"
            )
        held = self.pages(seat.user)
        if held + pages > seat.limits.export_pages:
            raise QuotaError(
                f"{pages} pages more than the {held} that this user's exports hold; the cap is "
                f"{seat.limits.export_pages}",
                "unexport_kvpage what is done with, or launch with a larger --quota export_pages",
            )
        if self._meta.get(seat.user, 0) + len(meta) > _MOST_META:
            raise QuotaError(
                f"the meta of this user's exports would be more than {_MOST_META} octets",
                "keep large data elsewhere, or unexport_kvpage what is done with",
            )

    def add(self, export: Export) -> None:
        for page in export.pages:
            self._pool.retain(page)
        user = export.user
        self._users.setdefault(user, {})[export.name] = export
        self._pages[user] = self.pages(user) + len(export.pages)
        self._meta[user] = self._meta.get(user, 0) + len(export.meta)
        self.renew(export)

    def renew(self, export: Export) -> None:
        """Its lease begins anew."""
        if export.lease is not None:
            export.expires = time.monotonic() + export.lease
            self.next_expiry = min(self.next_expiry, export.expires)

    def expire(self) -> None:
        """Ends the exports whose lease is over."""
        now = time.monotonic()
        if now < self.next_expiry:
            return
        for export in self._all():
            if export.expires <= now:
                self._drop(export)
        self.next_expiry = min((e.expires for e in self._all()), default=math.inf)

    def exporter_ended(self, seat: Seat) -> None:
        """Ends the inferlet's exports that have no lease; the others may go when pages run out."""
        for export in list(self._users.get(seat.user, {}).values()):
            if export.exporter == seat.number:
                export.orphaned = True
                if export.lease is None:
                    self._drop(export)

    def drop_orphan(self) -> bool:
        """Ends the export nearest to its end among those whose exporter has; False: none."""
        orphans = [e for e in self._all() if e.orphaned]
        if not orphans:
            return False
        self._drop(min(orphans, key=lambda e: e.expires))
        return True

    def _all(self) -> list[Export]:
        return [e for exports in self._users.values() for e in exports.values()]

    def _drop(self, export: Export) -> None:
        user = export.user
        del self._users[user][export.name]
        self._pages[user] -= len(export.pages)
        self._meta[user] -= len(export.meta)
        for page in export.pages:
            self._pool.release(page)
        if not self._users[user]:
            del self._users[user], self._pages[user], self._meta[user]

    def _unexport(self, seat: Seat, c: abi.UnexportKvPage) -> None:
        self._drop(self.find(seat.user, c.name))
        seat.answer(c.req, None)

    def _list(self, seat: Seat, c: abi.ListExported) -> None:
        check_name(c.prefix)
        check_name(c.after)
        self.expire()
        exports = self._users.get(seat.user, {})
        # by code points, which is the order of the octets of UTF-8
        names = sorted(n for n in exports if n.startswith(c.prefix) and n > c.after)
        listed: list[tuple[str, int, str, float | None]] = []
        octets = 0
        for name in names[: abi.MAX_LISTED]:
            export = exports[name]
            octets += len(name.encode()) + len(export.exporter_id.encode()) + 32
            if octets > _MOST_ANSWER:
                break
            listed.append((name, len(export.pages), export.exporter_id, export.seconds_left()))
        seat.answer(c.req, listed)


# --- queue commands ---------------------------------------------------------------------------


def export_kvpage(run: Run, c: abi.ExportKvPage) -> bool:
    seat, machine, size = run.seat, run.machine, run.machine.model.page_size
    if run.queue.flight is not None:
        return False  # whoever imports is to see what is settled
    machine.exports.check(seat, c.name, sum(pages for _, _, pages in c.pages), c.meta)
    parts: list[tuple[KvBlock, int, int]] = []
    for kv, first, pages in c.pages:
        if pages == 0:
            raise ArgumentError("an export of 0 pages of a handle", "export at least one")
        parts.append((kv_block(seat, (kv, first * size, pages * size), "pages"), first, pages))
    if not all(run.settled(block) for block, _, _ in parts):
        return False
    if not run.has_turn(sum(pages for _, _, pages in parts)):
        return False
    export = Export(c.name, seat, c.meta, c.lease)
    for block, first, pages in parts:
        export.append(block, first, pages)
    machine.exports.add(export)
    run.answer(c.req, None)
    return True


def import_kvpage(run: Run, c: abi.ImportKvPage) -> bool:
    seat, machine = run.seat, run.machine
    unused(seat.kvs, c.kv, "kv")
    export = machine.exports.find(seat.user, c.name)
    seat.check_pages(len(export.pages))
    octets = len(export.meta) if c.req is not None else 0
    seat.check_unread(octets)
    if not run.has_turn(len(export.pages)):
        return False
    block = KvBlock(run.queue, export.pages[:], machine.model.page_size)
    block.regular, block.base, block.filled = export.regular, export.base, export.filled
    for page in block.pages:
        machine.pages.retain(page)
    seat.pages_held += len(block.pages)
    seat.kvs[c.kv] = block
    machine.exports.renew(export)
    seat.unsent += octets
    run.answer(c.req, (len(block.pages), export.meta))
    return True
