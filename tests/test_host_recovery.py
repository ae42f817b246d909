"""kill -9 of each of the host's processes: a typed reason for what ran, and then it goes on."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from piehost.host.client import Client
from piehost.wire.client import Message, weight

from .host_harness import (
    DEADLINE,
    WAIT,
    Server,
    all_gone,
    compile_c,
    debugged,
    eventually,
    new_terminal,
    started,
    write_program,
)
from .raw_inferlet import write_raw

GENERATE = """
    from inferlet import Model, inferlet

    @inferlet
    def complete(model: Model):
        with model.context("The capital of France is") as context:
            yield from context.generate(4)
"""
SLEEP = """
    #include <unistd.h>
    #include <time.h>
    int main(void) {
        struct timespec hour = {3600, 0};
        if (write(1, "ready", 5) != 5) return 1;
        nanosleep(&hour, 0);
        return 0;
    }
"""


@pytest.fixture(scope="module")
def victim() -> Iterator[Server]:
    """A server that gets hurt. That each test finds it working shows that the last one healed."""
    with new_terminal() as terminal, terminal.server() as running:
        yield running


def generates(client: Client, tmp_path: Path) -> bool:
    result = client.launch(write_program(tmp_path, "generate.py", GENERATE)).result(DEADLINE)
    return result.code == 0 and result.text.startswith(" Paris")


@pytest.mark.parametrize("name", ["backend", "controller"])
def test_killed_core_process(victim: Server, tmp_path: Path, name: str) -> None:
    with victim.client() as client:
        assert generates(client, tmp_path)
        run = started(client, write_program(tmp_path, "wait.py", WAIT))
        process = psutil.Process(run.pid)
        before = client.stats()
        victim.kill(name)
        ended = run.result(DEADLINE)
        assert ended.code == 125
        assert ended.reason is not None and ended.reason.code == f"{name}_lost"
        assert ended.reason.what and ended.reason.why and ended.reason.hint
        assert all_gone([process])
        assert generates(client, tmp_path)  # waits for the new one
        after = client.stats()
        assert after.restarts == before.restarts + 1
        assert after.children["backend"] != before.children["backend"]
        assert after.children["controller"] != before.children["controller"]
        assert after.children["zygote"] == before.children["zygote"]


def test_a_child_that_waits_for_rings_does_not_begin_on_a_new_core(
    victim: Server, tmp_path: Path
) -> None:
    """Its parent is dead, but the host does not know it yet: the zygote cannot say so."""
    source = """
        say("ready")
        ask(RECEIVE)
        post(SPAWN, 1, "", ["child"])
        say("asked")
        time.sleep(3600)
    """
    native = compile_c(tmp_path, "sleep", SLEEP)
    with victim.client() as client, contextlib.ExitStack() as held:
        # rings of that size are not made ahead
        run = client.launch(write_raw(tmp_path, "wait.py", source), [], {"ring_bytes": "8MiB"})
        children = client.stats().children
        backend, zygote = children["backend"], children["zygote"]
        for event in run.events():
            if getattr(event, "data", b"") == b"ready":
                held.enter_context(debugged(backend))
                run.send(b"go on")
            elif getattr(event, "data", b"") == b"asked":
                break
        with debugged(zygote):
            os.kill(backend, signal.SIGKILL)
            later = started(client, native)  # all that waited before it has begun, or never will
            assert {i.id for i in client.inferlets()} == {run.id, later.id}
        result = run.result(DEADLINE)
        assert result.reason is not None and result.reason.code == "backend_lost"
        later.cancel()
        later.result(DEADLINE)
        assert generates(client, tmp_path)


def test_killed_zygote_ends_python_inferlets_only(victim: Server, tmp_path: Path) -> None:
    with victim.client() as client:
        python = started(client, write_program(tmp_path, "wait.py", WAIT))
        native = started(client, compile_c(tmp_path, "sleep", SLEEP))
        process = psutil.Process(python.pid)
        victim.kill("zygote")
        ended = python.result(DEADLINE)
        assert ended.code == 125 and ended.reason is not None
        assert ended.reason.code == "launcher_lost"
        assert eventually(lambda: all_gone([process]))
        assert [i.id for i in client.inferlets()] == [native.id]
        assert generates(client, tmp_path)


def test_killed_launcher_ends_native_inferlets_only(victim: Server, tmp_path: Path) -> None:
    with victim.client() as client:
        python = started(client, write_program(tmp_path, "wait.py", WAIT))
        native = started(client, compile_c(tmp_path, "sleep", SLEEP))
        process = psutil.Process(native.pid)
        victim.kill("launcher")
        ended = native.result(DEADLINE)
        assert ended.code == 125 and ended.reason is not None
        assert ended.reason.code == "launcher_lost"
        assert eventually(lambda: all_gone([process]))
        python.send(b"go")
        assert python.result(DEADLINE).code == 0
        again = started(client, tmp_path / "sleep")
        again.cancel()
        assert again.result(DEADLINE).code == 128 + signal.SIGKILL


def test_killed_inferlet(victim: Server, tmp_path: Path) -> None:
    with victim.client() as client:
        run = started(client, write_program(tmp_path, "wait.py", WAIT))
        other = started(client, tmp_path / "wait.py")
        os.kill(run.pid, signal.SIGKILL)
        ended = run.result(DEADLINE)
        assert ended.code == 128 + signal.SIGKILL
        assert ended.reason is not None and ended.reason.code == "signal"
        assert "SIGKILL" in ended.reason.what
        other.send(b"go")
        assert other.result(DEADLINE).code == 0


def test_launches_during_a_restart_wait_for_it(victim: Server, tmp_path: Path) -> None:
    path = write_program(tmp_path, "generate.py", GENERATE)
    with victim.client() as client:
        before = client.stats().restarts
        victim.kill("backend")
        assert eventually(lambda: client.stats().restarts == before + 1)
        runs = [client.launch(path) for _ in range(5)]
        results = [run.result(DEADLINE) for run in runs]
    assert [result.code for result in results] == [0] * 5
    texts = {result.text for result in results}
    assert len(texts) == 1 and texts.pop().startswith(" Paris")


@pytest.mark.parametrize("octets", [60000, 0])
def test_client_that_does_not_read_is_ended(victim: Server, tmp_path: Path, octets: int) -> None:
    """Empty messages take memory too."""
    source = f"""
        from inferlet import flush, send

        while True:
            send(b"x" * {octets})
            flush()
    """
    path = write_program(tmp_path, "flood.py", source)
    with victim.client() as client, victim.client() as observer:
        flood = client.launch(path)
        assert eventually(lambda: bool(observer.inferlets()))
        assert eventually(lambda: not observer.inferlets(), DEADLINE)
        events = list(flood.events())
        assert sum(weight(e.data) for e in events if isinstance(e, Message)) >= 64 << 20
        assert generates(observer, tmp_path)
