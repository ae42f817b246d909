from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from scripted import Host


@pytest.fixture
def make_host() -> Iterator[Callable[..., Host]]:
    """Hosts with the given arguments, closed at the end; a program must not break any."""
    hosts: list[Host] = []

    def make(*args: Any, **options: Any) -> Host:
        hosts.append(Host(*args, **options))
        return hosts[-1]

    yield make
    for host in hosts:
        host.close()
        assert not host.controller.broken


@pytest.fixture
def host(make_host: Callable[..., Host]) -> Host:
    return make_host()
