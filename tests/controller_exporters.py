"""Controllers of which each test must have every page back, and inferlets with pages to export."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from inferlet import abi

from .controller_answers import settle
from .controller_process import ControllerProcess, Peer
from .controller_programs import Q, setup

PAGES = 64


@pytest.fixture
def controller() -> Iterator[ControllerProcess]:
    """Each test must leave no page held."""
    process = ControllerProcess(pages=PAGES)
    yield process
    while process.collect():
        process.serve()
    for seat in process.stats().seats:
        process.release(seat)
    names = [abi.UnexportKvPage(None, name) for name in ("a", "b", "c")]
    for user in ("", "u"):
        seat, peer = process.admit(user=user)
        peer.put(*names)
        settle(process)
        process.release(seat)
    total = process.stats().total
    assert (total.pages_free, total.rows_free, total.seats) == (PAGES, 256, 0)
    process.close()


def ready(controller: ControllerProcess, prompt: list[int], slots: int, **admit: str) -> Peer:
    """An inferlet that has run `prompt`."""
    _, peer = controller.admit(**admit)  # type: ignore[arg-type]
    peer.put(*setup(prompt, slots), abi.Synchronize(1, Q))
    assert controller.wait(peer, 1) is None
    return peer
