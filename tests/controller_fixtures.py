"""Controllers for a module of tests, or for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .controller_process import ControllerProcess

PAGES = 64


@pytest.fixture(scope="module")
def shared() -> Iterator[ControllerProcess]:
    process = ControllerProcess()
    yield process
    process.close()


@pytest.fixture
def emptied(shared: ControllerProcess) -> Iterator[ControllerProcess]:
    """The module's one, which each test finds without inferlets."""
    yield shared
    for seat in shared.stats().seats:
        shared.release(seat)
    shared.inbox.clear()


@pytest.fixture
def audited() -> Iterator[ControllerProcess]:
    """Each test must leave its counters where they were."""
    process = ControllerProcess(pages=PAGES, chunk=32)
    yield process
    if not process.backend.sock._closed:  # type: ignore[attr-defined]
        while process.collect():
            process.serve()
    for seat in process.stats().seats:
        process.release(seat)
    total = process.stats().total
    assert (total.pages_free, total.rows_free, total.seats) == (PAGES, 256, 0)
    process.close()
