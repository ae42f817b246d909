"""One controller for wrong input of many kinds, and what shows that it is as before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from inferlet import abi

from .controller_process import VOCAB, ControllerProcess, Peer
from .controller_programs import EMB, KV, OUT, Q, chain, setup
from .toy_device import greedy

PREPARED = setup([1, 2, 3], 16)  # 2 pages, 3 slots written, emb 1 holds text, emb 2 an output


@pytest.fixture(scope="module")
def shared() -> Iterator[ControllerProcess]:
    process = ControllerProcess(pages=128)
    yield process
    process.close()


@pytest.fixture
def controller(shared: ControllerProcess) -> Iterator[ControllerProcess]:
    """One controller for all; each test must leave its counters where they were."""
    yield shared
    for seat in shared.stats().seats:
        shared.release(seat)
    total = shared.stats().total
    assert (total.pages_free, total.rows_free, total.seats) == (128, 256, 0)


def assert_generates(controller: ControllerProcess, peer: Peer | None = None) -> None:
    """A correct program still gets the correct tokens."""
    if peer is None:
        _, peer = controller.admit()
    peer.put(*setup([4, 5, 6], 16), *chain(3, 6, 1000, []), abi.Synchronize(999, Q))
    controller.wait(peer, 999)
    assert [peer.wait(1000 + i) for i in range(6)] == greedy([4, 5, 6], 6, VOCAB)


def fwd(**changes: Any) -> abi.Forward:
    fields: dict[str, Any] = {
        "req": 50,
        "queue": Q,
        "inputs": (EMB, 0, 1),
        "reads": [(KV, 0, 3)],
        "write": (KV, 3, 1),
        "outputs": (OUT, 0, 1),
    }
    return abi.Forward(**{**fields, **changes})
