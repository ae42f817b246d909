"""A host that gets no more memory from the kernel: new work fails, with a reason; nothing else."""

from __future__ import annotations

import resource
import threading
from pathlib import Path

import psutil
import pytest

from piehost.host.errors import FailedAnswer

from .host_harness import DEADLINE, SCRIPTED, WAIT, new_terminal, started, write_program

ARGUMENTS = ["x" * 100_000] * 30  # of a launch: more than the host gets


@pytest.mark.parametrize("spare", [1 << 20, 4 << 20])
def test_a_host_without_memory_refuses_new_work_only(tmp_path: Path, spare: int) -> None:
    """1 MiB is too little for ZeroMQ to receive such a launch, 4 MiB for the host to read it."""
    wait = write_program(tmp_path, "wait.py", WAIT)
    with (
        new_terminal() as terminal,
        terminal.server(*SCRIPTED) as server,
        server.client() as client,
    ):
        assert server.process.stderr is not None
        threading.Thread(target=server.process.stderr.read, daemon=True).start()
        host = server.process.pid
        run = started(client, wait)
        before = client.stats().children
        limits = resource.prlimit(host, resource.RLIMIT_AS)
        with server.client() as another:
            another.stats()
            most = psutil.Process(host).memory_info().vms + spare
            resource.prlimit(host, resource.RLIMIT_AS, (most, limits[1]))
            try:
                with pytest.raises(FailedAnswer):
                    another.launch(wait, ARGUMENTS).result(DEADLINE)
            finally:
                resource.prlimit(host, resource.RLIMIT_AS, limits)
        later = started(client, wait, *ARGUMENTS)
        for each in (later, run):
            each.send(b"go on")
            assert each.result(DEADLINE).code == 0
        assert client.stats().children == before
