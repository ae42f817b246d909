"""Who holds which KV page: random programs of several inferlets and users against naive oracles.

The oracles keep no counts. How often a page is held is found by looking through everything that
holds pages, each time anew.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from inferlet import abi
from inferlet import errors as e

from piehost.controller.pools import PagePool
from piehost.wire import control

from .controller_process import LIMITS, PAGE, AnswerError, ControllerProcess, Peer

# `make fuzz` raises it
EXAMPLES = int(os.environ.get("PIEHOST_FUZZ_EXAMPLES", "60"))
SHORT = EXAMPLES == 60  # always the same programs; one that fails is not made shorter
SETTINGS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    derandomize=SHORT,
    phases=[Phase.generate] if SHORT else [*Phase],
)
POOL = 12
TOTAL, EXPORT_PAGES, SEATS = 400, 10, 4
HANDLES, NAMES = st.integers(1, 8), ("a", "b", "ä")
FIRST, PAGES, CAPS = st.integers(0, 3), st.integers(0, 3), st.integers(4, 20)

Refusals = set[type[e.InferletError]]


class Pool(RuleBasedStateMachine):
    """The allocator alone. `held` has a page once for each holder."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(POOL)
        self.held: list[int] = []
        self.resting: set[int] = set()  # let go since the last step

    @rule(share=st.floats(0, 1))
    def take(self, share: float) -> None:
        count = int(share * self.pool.available)
        pages = list(self.pool.take(count))
        assert len(set(pages)) == count and set(pages) <= set(range(POOL))
        assert not set(pages) & {*self.held, *self.resting}, "it is somebody's, or may be read"
        self.held += pages

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.held))
        self.pool.retain(page)
        self.held.append(page)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.held))
        self.held.remove(page)
        assert self.pool.release(page) == (page not in self.held)
        if page not in self.held:
            self.resting.add(page)

    @rule()
    def settle(self) -> None:
        self.pool.settle()
        self.resting.clear()

    @invariant()
    def every_count_is_right(self) -> None:
        holders = Counter(self.held)
        assert [self.pool.references(page) for page in range(POOL)] == [
            holders[page] for page in range(POOL)
        ]
        assert {page for page in range(POOL) if self.pool.shared(page)} == {
            page for page, count in holders.items() if count > 1
        }
        assert self.pool.shared_pages == sum(count > 1 for count in holders.values())
        assert self.pool.free == POOL - len(holders)
        assert self.pool.available == POOL - len(holders) - len(self.resting)


class Inferlet:
    def __init__(self, peer: Peer, user: str, cap: int) -> None:
        self.peer, self.user, self.cap = peer, user, cap
        self.kvs: dict[int, list[int | None]] = {}  # None: freed

    def held(self) -> list[int]:
        return [page for kv in self.kvs.values() for page in kv if page is not None]

    def full(self, pages: int) -> bool:
        return len(self.held()) + pages > self.cap or len(self.kvs) >= self.cap


class Export:
    def __init__(self, exporter: int, pages: list[int], lease: int | None) -> None:
        self.exporter, self.pages, self.lease = exporter, pages, lease


class Machine(RuleBasedStateMachine):
    """Inferlets of two users on a real controller. One command at a time; where several things are
    wrong with it, any of them may be what is answered."""

    controller: ControllerProcess

    def __init__(self) -> None:
        super().__init__()
        self.inferlets: dict[int, Inferlet] = {}
        self.exports: dict[tuple[str, str], Export] = {}  # by user and name
        self.page = itertools.count()
        self.admit("one", 20)

    def teardown(self) -> None:
        for seat in list(self.inferlets):
            self.end(seat)
        names = [(user, name) for user, name in self.exports]
        for user in {user for user, _ in names}:
            seat = self.admit(user, 4)
            for _, name in [key for key in names if key[0] == user]:
                self.unexport(seat, name)
            self.end(seat)
        total = self.controller.stats().total
        assert (total.pages_free, total.seats) == (TOTAL, 0)

    # --- what the rules are made of -------------------------------------------

    def admit(self, user: str, cap: int) -> int:
        seat, peer = self.controller.admit(user=user, kv_pages=cap, export_pages=EXPORT_PAGES)
        self.inferlets[seat] = Inferlet(peer, user, cap)
        peer.ask(abi.CreateQueue(1, 1))
        self.alloc_in(seat, 1, 4)
        return seat

    def end(self, seat: int) -> None:
        self.controller.release(seat)
        self.inferlets.pop(seat).peer.sock.close()
        for key, export in list(self.exports.items()):
            if export.exporter == seat and export.lease is None:
                del self.exports[key]

    def unexport(self, seat: int, name: str) -> None:
        key = (self.inferlets[seat].user, name)
        self.ask(
            seat, abi.UnexportKvPage(2, name), set() if key in self.exports else {e.NotFoundError}
        )
        self.exports.pop(key, None)

    def ask(self, seat: int, command: Any, wrong: Refusals, expected: Any = None) -> bool:
        """True if it went well, as it had to."""
        peer = self.inferlets[seat].peer
        peer.put(command)
        try:
            value = self.controller.wait(peer, command.req)
        except AnswerError as error:
            assert error.code in {kind.code for kind in wrong}, f"{command}: {error}"
            if hasattr(command, "queue"):
                with pytest.raises(AnswerError):  # it tells of the error, and the queue goes on
                    peer.ask(abi.Synchronize(3, 1))
            return False
        assert not wrong, f"{command} was to fail with one of {wrong}"
        assert value == expected, command
        return True

    def holders(self) -> Counter[int]:
        pages = Counter(page for one in self.inferlets.values() for page in one.held())
        for export in self.exports.values():
            pages.update(export.pages)
        return pages

    def slice(self, seat: int, kv: int, first: int, count: int) -> tuple[list[int], Refusals]:
        """Pages of a handle, and what is wrong with asking for them."""
        pages = self.inferlets[seat].kvs.get(kv)
        if pages is None:
            return [], {e.HandleError}
        chosen = [page for page in pages[first : first + count] if page is not None]
        return chosen, set() if len(chosen) == count else {e.SpanError}

    def any_seat(self, data: st.DataObject) -> int:
        seat: int = data.draw(st.sampled_from(sorted(self.inferlets)), "seat")
        return seat

    def any_name(self, data: st.DataObject, seat: int) -> str:
        """Mostly of an export of its user's."""
        theirs = [name for user, name in self.exports if user == self.inferlets[seat].user]
        name: str = data.draw(st.sampled_from([*theirs * 4, *NAMES]), "name")
        return name

    def any_kv(self, data: st.DataObject, seat: int) -> int:
        """Of those it has, mostly; what it has not may be free, or another's."""
        mine = sorted(self.inferlets[seat].kvs)
        kv: int = data.draw(st.sampled_from([*mine * 4, *range(1, 6)]), "kv")
        return kv

    # --- rules ----------------------------------------------------------------

    @precondition(lambda self: len(self.inferlets) < SEATS)
    @rule(user=st.sampled_from(["one", "two"]), cap=CAPS)
    def somebody_comes(self, user: str, cap: int) -> None:
        self.admit(user, cap)

    @precondition(lambda self: len(self.inferlets) > 1)
    @rule(data=st.data())
    def somebody_ends(self, data: st.DataObject) -> None:
        self.end(self.any_seat(data))

    @rule(data=st.data(), kv=HANDLES, pages=st.sampled_from([0, 2, 3, 4, 7]))
    def alloc(self, data: st.DataObject, kv: int, pages: int) -> None:
        self.alloc_in(self.any_seat(data), kv, pages)

    def alloc_in(self, seat: int, kv: int, pages: int) -> None:
        one = self.inferlets[seat]
        wrong: Refusals = {e.HandleError} if kv in one.kvs else set()
        wrong |= {e.ArgumentError} if not pages else set()
        wrong |= {e.QuotaError} if one.full(pages) else set()
        if self.ask(seat, abi.AllocKvPage(2, 1, kv, pages), wrong):
            one.kvs[kv] = [next(self.page) for _ in range(pages)]

    @rule(data=st.data(), first=FIRST, pages=st.none() | PAGES)
    def free(self, data: st.DataObject, first: int, pages: int | None) -> None:
        seat = self.any_seat(data)
        kv = self.any_kv(data, seat)
        kvs = self.inferlets[seat].kvs
        held = kvs.get(kv)
        wrong: Refusals = {e.HandleError} if held is None else set()
        last = first + pages if pages is not None else len(held or ())
        if held is not None and not first <= last <= len(held):
            wrong = {e.SpanError}
        if self.ask(seat, abi.DeallocKvPage(2, 1, kv, first, pages), wrong):
            kvs[kv][first:last] = [None] * (last - first)
            if first == 0 and pages is None:
                del kvs[kv]

    @rule(data=st.data(), kv=HANDLES, first=FIRST, pages=PAGES)
    def share(self, data: st.DataObject, kv: int, first: int, pages: int) -> None:
        seat = self.any_seat(data)
        source = self.any_kv(data, seat)
        one = self.inferlets[seat]
        chosen, wrong = self.slice(seat, source, first, pages)
        wrong |= {e.HandleError} if kv in one.kvs else set()
        wrong |= {e.ArgumentError} if not pages else set()
        wrong |= {e.QuotaError} if one.full(pages) else set()
        if self.ask(seat, abi.ShareKvPage(2, 1, kv, source, first, pages), wrong):
            one.kvs[kv] = [*chosen]

    @rule(data=st.data(), first=st.integers(0, 12), length=st.integers(1, 12))
    def write(self, data: st.DataObject, first: int, length: int) -> None:
        seat = self.any_seat(data)
        kv = self.any_kv(data, seat)
        begin, end = first // PAGE, -(-(first + length) // PAGE)
        pages, wrong = self.slice(seat, kv, begin, end - begin)
        holders = self.holders()
        wrong |= {e.SharedPageError} if any(holders[page] > 1 for page in pages) else set()
        self.ask(seat, abi.MaskKvPage(2, 1, (kv, first, length), False), wrong)

    @rule(
        data=st.data(),
        name=st.sampled_from(NAMES),
        places=st.lists(st.tuples(FIRST, st.integers(1, 3)), min_size=1, max_size=2),
        lease=st.sampled_from([None, 600]),
    )
    def export(
        self,
        data: st.DataObject,
        name: str,
        places: list[tuple[int, int]],
        lease: int | None,
    ) -> None:
        seat = self.any_seat(data)
        user = self.inferlets[seat].user
        ranges = [(self.any_kv(data, seat), *place) for place in places]
        parts = [self.slice(seat, *each) for each in ranges]
        pages = [page for chosen, _ in parts for page in chosen]
        wrong: Refusals = set().union(*(each for _, each in parts))
        wrong |= {e.ArgumentError} if (user, name) in self.exports else set()
        exported = sum(len(x.pages) for (owner, _), x in self.exports.items() if owner == user)
        if exported + sum(count for _, _, count in ranges) > EXPORT_PAGES:
            wrong |= {e.QuotaError}
        if self.ask(seat, abi.ExportKvPage(2, 1, name, ranges, b"", lease), wrong):
            self.exports[user, name] = Export(seat, pages, lease)

    @precondition(lambda self: self.exports)
    @rule(data=st.data())
    def import_(self, data: st.DataObject) -> None:
        """Mostly what goes well, by an inferlet of the exporter's user."""
        user, name = data.draw(st.sampled_from(sorted(self.exports)), "export")
        theirs = [seat for seat, one in self.inferlets.items() if one.user == user]
        seat = data.draw(st.sampled_from([*theirs * 4, *sorted(self.inferlets)]), "seat")
        free = [kv for kv in range(1, 9) if kv not in self.inferlets[seat].kvs]
        kv = data.draw(st.sampled_from([*free * 4, *range(1, 9)]), "kv")
        one = self.inferlets[seat]
        found = self.exports.get((one.user, name))
        wrong: Refusals = {e.HandleError} if kv in one.kvs else set()
        wrong |= {e.NotFoundError} if found is None else set()
        wrong |= {e.QuotaError} if one.full(len(found.pages) if found else 0) else set()
        value = [len(found.pages), b""] if found else None
        if self.ask(seat, abi.ImportKvPage(2, 1, kv, name), wrong, value) and found:
            one.kvs[kv] = [*found.pages]

    @precondition(lambda self: self.exports)
    @rule(data=st.data())
    def unexport_any(self, data: st.DataObject) -> None:
        seat = self.any_seat(data)
        self.unexport(seat, self.any_name(data, seat))

    @rule(data=st.data(), cap=CAPS)
    def the_cap_changes(self, data: st.DataObject, cap: int) -> None:
        """What an inferlet holds beyond it stays."""
        seat = self.any_seat(data)
        limits = {"kv_pages": cap, "export_pages": EXPORT_PAGES}
        changed = msgspec.structs.replace(LIMITS, **limits)
        self.controller.host.send(control.SetLimits(seat, changed, control.Rates()))
        self.inferlets[seat].cap = cap

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        stats = self.controller.stats()
        held = {seat: len(one.held()) for seat, one in self.inferlets.items()}
        assert {seat: counters.kv_pages for seat, counters in stats.seats.items()} == held
        assert stats.total.pages_free == TOTAL - len(self.holders())


@pytest.fixture
def controller() -> Iterator[ControllerProcess]:
    process = ControllerProcess(pages=TOTAL)
    yield process
    process.close()


def test_the_pool_gives_each_page_once() -> None:
    run_state_machine_as_test(Pool, settings=SETTINGS)


def test_pages_are_held_as_long_as_somebody_holds_them(controller: ControllerProcess) -> None:
    Machine.controller = controller
    run_state_machine_as_test(Machine, settings=SETTINGS)
