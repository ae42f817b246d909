"""Many launches: the accounts are afterwards what they were before."""

from __future__ import annotations

import os
import re
from collections import Counter
from functools import partial
from pathlib import Path

import psutil

from piehost.host.client import Client
from piehost.wire.client import HostStats

from .host_harness import DEADLINE, Server, compile_c, eventually, family, write_program

GENERATE = """
    from inferlet import Model, inferlet

    @inferlet
    def complete(model: Model):
        with model.context("The capital of France is") as context:
            yield from context.generate(2)
"""
LAUNCHES = 200


def processes(server: Server, client: Client) -> dict[str, psutil.Process]:
    pids = {"host": server.process.pid, **client.stats().children}
    return {name: psutil.Process(pid) for name, pid in pids.items()}


def descriptors(client: Client, name: str, process: psutil.Process) -> Counter[str]:
    """What the process has open, by kind: sockets, pipes, memfds by name without number. Rings that
    are ready for the next launches, two of each in host and backend, are left out."""
    kinds: Counter[str] = Counter()
    if name in ("host", "backend"):
        kinds["rings"] = -2 * client.stats().rings_ready
    for fd in os.listdir(f"/proc/{process.pid}/fd"):
        try:
            target = os.readlink(f"/proc/{process.pid}/fd/{fd}")
        except FileNotFoundError:  # it was closed as we looked
            continue
        kind = re.sub(r"[0-9]+|:\[.*| \(deleted\)", "", target)
        kinds["rings" if "piehost-ring" in kind else kind] += 1
    return kinds


def has_same(client: Client, name: str, process: psutil.Process, before: Counter[str]) -> bool:
    """Whether it has the descriptors it had."""
    return descriptors(client, name, process) == before


def has_no_ring_on_its_way(client: Client, name: str, process: psutil.Process) -> bool:
    """All that it has are ready, or an inferlet's."""
    return descriptors(client, name, process)["rings"] == 0


def settled(stats: HostStats) -> bool:
    return stats.controller.seats == 0 and not stats.seats


def test_200_launches_leave_everything_where_it_was(server: Server, tmp_path: Path) -> None:
    python = write_program(tmp_path, "generate.py", GENERATE)
    native = compile_c(tmp_path, "hello", "int main(void) { return 0; }")
    with server.client() as client:
        for _ in range(40):  # past first uses, and past one refill of the ring pool
            assert client.launch(native).result(DEADLINE).code == 0
        assert client.launch(python).result(DEADLINE).code == 0
        assert eventually(lambda: settled(client.stats()) and client.stats().rings_ready >= 16)
        ours = processes(server, client)
        for name in ("host", "backend"):
            assert eventually(partial(has_no_ring_on_its_way, client, name, ours[name]))
        before = client.stats()
        open_before = {name: descriptors(client, name, each) for name, each in ours.items()}
        memory_before = {name: process.memory_info().rss for name, process in ours.items()}

        for i in range(LAUNCHES):
            result = client.launch(python if i % 4 == 0 else native).result(DEADLINE)
            assert result.code == 0, result
        assert eventually(lambda: settled(client.stats()))
        after = client.stats()

        assert after.launches == before.launches + LAUNCHES
        assert after.restarts == before.restarts
        assert set(family(server.process.pid)) == set(ours.values())
        assert after.controller.pages_free == before.controller.pages_free
        assert after.controller.rows_free == before.controller.rows_free
        for name, process in ours.items():
            # the last inferlet's pidfd is held until it would have been moved to its group
            same = partial(has_same, client, name, process, open_before[name])
            now = descriptors(client, name, process)
            assert eventually(same), (name, now, open_before[name])
            growth = process.memory_info().rss - memory_before[name]
            assert growth < 8 << 20, (name, growth)


def test_100_launches_at_once(server: Server, tmp_path: Path) -> None:
    """More than there are rings ready; each gets its own messages."""
    source = "from inferlet import args, flush, receive, send\nsend(args()[0]); receive().result()"
    path = write_program(tmp_path, "name.py", source)
    with server.client() as client:
        runs = [client.launch(path, [str(i)]) for i in range(100)]
        for run in runs:
            run.send(b"go")
        results = [run.result(DEADLINE) for run in runs]
        assert [result.code for result in results] == [0] * 100
        assert [result.text for result in results] == [str(i) for i in range(100)]
        numbers = [int(result.id.rpartition("-")[2]) for result in results]
        assert numbers == sorted(numbers)  # the newest has the largest
        assert eventually(lambda: settled(client.stats()))
