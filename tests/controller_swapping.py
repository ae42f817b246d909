"""Controllers with few pages and some host memory, and inferlets whose pages have to go there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from inferlet import abi

from piehost.wire import control

from .controller_answers import settle
from .controller_process import PAGE, VOCAB, ControllerProcess, Peer
from .controller_programs import PROMPT, Q, chain, setup
from .toy_device import greedy

PAGES, PLACES = 24, 64
TEXT = greedy(PROMPT, 4, VOCAB)


@pytest.fixture
def controller() -> Iterator[ControllerProcess]:
    """Each test must leave no page held, of either memory."""
    process = ControllerProcess(pages=PAGES, swap_pages=PLACES)
    yield process
    leave(process)
    process.close()


def leave(controller: ControllerProcess) -> None:
    """Ends all inferlets: every counter is back where it began."""
    while controller.collect():
        controller.serve()
    for seat in controller.stats().seats:
        controller.release(seat)
    total = controller.stats().total
    assert (total.pages_free, total.swap_free) == (total.pages_total, total.swap_total)
    assert (total.rows_free, total.seats) == (256, 0)


def nobody_ended(controller: ControllerProcess) -> None:
    settle(controller)
    assert not [m for m in controller.inbox if isinstance(m, control.End)]


def sleeper(controller: ControllerProcess, pages: int, **admit: Any) -> tuple[int, Peer]:
    """An inferlet that holds `pages` pages, has run PROMPT in the first two, and waits."""
    seat, peer = controller.admit(**admit)
    peer.put(*setup(PROMPT, pages * PAGE), abi.Synchronize(1, Q))
    assert controller.wait(peer, 1) is None
    return seat, peer


def wakes(controller: ControllerProcess, peer: Peer, count: int = 4) -> list[int]:
    """Goes on where `sleeper` left off."""
    start = 200 + peer.request()
    peer.put(*chain(len(PROMPT), count, start, []))
    return [controller.wait(peer, start + i) for i in range(count)]


def takes(controller: ControllerProcess, peer: Peer, pages: int) -> None:
    peer.put(abi.CreateQueue(None, Q), abi.AllocKvPage(2, Q, 2, pages))
    assert controller.wait(peer, 2) is None


def away(controller: ControllerProcess) -> dict[int, int]:
    """By seat: pages in host memory."""
    seats = controller.stats().seats
    return {n: s.swapped_pages for n, s in seats.items() if s.swapped_pages}
