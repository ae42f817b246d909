"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from piehost.host.client import Client

from .host_harness import Server, Terminal, new_terminal


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One real `piehost serve` with the embedded model for tests that do no harm to it."""
    with new_terminal() as made, made.server() as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    """A client of the shared server; what it launched ends with the test."""
    with server.client() as connected:
        yield connected


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """A run directory in which no server runs."""
    with new_terminal() as made:
        yield made
