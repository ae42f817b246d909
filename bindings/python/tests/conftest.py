from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from inferlet import Runtime
from inferlet.runtime import runtime
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


@pytest.fixture
def attached(host: Host) -> Iterator[Host]:
    """A host whose inferlet is this process: the module's own functions speak to it."""
    before = dict(vars(runtime))
    vars(runtime).clear()
    Runtime.__init__(runtime, *host.fds)
    host._runtime = runtime
    yield host
    gc.collect()  # what a test left is given back on this connection
    host._runtime = Runtime()
    vars(host._runtime).update(vars(runtime))
    vars(runtime).clear()
    vars(runtime).update(before)
