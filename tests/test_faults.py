"""What is killed, stopped or hangs is noticed and ended; all else goes on."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from piehost.host.children import Child
from piehost.host.client import Client
from piehost.host.errors import FailedAnswer
from piehost.host.watchdog import Patience, Watchdog
from piehost.wire.link import Link
from piehost.wire.services import Gone, ServiceToHost

from . import chaos
from .host_harness import (
    DEADLINE,
    SCRIPTED,
    WAIT,
    Server,
    all_gone,
    compile_c,
    debugged,
    eventually,
    has_its_group,
    new_terminal,
    started,
    write_program,
)
from .raw_inferlet import write_raw
from .test_host_recovery import GENERATE, SLEEP

BOTH_SERVICES = """
    ask(STORE_SET, "k", b"1")
    assert failure(HTTP_GET, 1, "http://127.0.0.1:9/") == 17  # unavailable: nobody listens there
    say("ready")
    ask(RECEIVE)
"""
SOON = Patience(look=0.02, ping=0.02, stopped=0.2, idle=0.5, busy=0.3)


@pytest.fixture(scope="module")
def victim() -> Iterator[Server]:
    with new_terminal() as terminal, terminal.server(*SCRIPTED) as running:
        yield running


def works(client: Client, tmp_path: Path) -> bool:
    result = client.launch(write_program(tmp_path, "generate.py", GENERATE)).result(DEADLINE)
    return result.code == 0 and result.text.startswith(" Paris")


# --- stopped -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["backend", "controller", "zygote"])
def test_a_stopped_process_is_ended(victim: Server, tmp_path: Path, name: str) -> None:
    with victim.client() as client:
        run = started(client, write_program(tmp_path, "wait.py", WAIT))
        os.kill(victim.child(name), signal.SIGSTOP)
        ended = run.result(DEADLINE)
        assert ended.code == 125 and ended.reason is not None
        assert ended.reason.code == ("launcher_lost" if name == "zygote" else f"{name}_lost")
        assert "was stopped (SIGSTOP)" in ended.reason.why
        assert works(client, tmp_path)


@pytest.mark.parametrize("name", ["launcher", "store", "egress"])
def test_a_stopped_process_that_others_do_not_need(
    victim: Server, tmp_path: Path, name: str
) -> None:
    with victim.client() as client:
        program = write_raw(tmp_path, "both.py", BOTH_SERVICES)
        run = started(client, program, egress=["127.0.0.1:9"])
        process = psutil.Process(victim.child(name))
        process.suspend()
        assert eventually(lambda: all_gone([process]))
        run.send(b"go on")
        assert run.result(DEADLINE).code == 0
        sleeper = started(client, compile_c(tmp_path, "sleep", SLEEP))
        sleeper.cancel()
        sleeper.result(DEADLINE)


def test_a_pause_or_a_debugger_is_no_fault(victim: Server, tmp_path: Path) -> None:
    with victim.client() as client:
        before = client.stats()
        run = started(client, write_program(tmp_path, "wait.py", WAIT))
        controller = psutil.Process(victim.child("controller"))
        controller.suspend()
        controller.resume()
        with debugged(victim.child("launcher")), pytest.raises(TimeoutError):
            run.result(2.5)  # longer than a stop may take
        run.send(b"go on")
        assert run.result(DEADLINE).code == 0
        assert client.stats().children == before.children


def test_a_stopped_inferlet_waits_and_holds_up_nobody(victim: Server, tmp_path: Path) -> None:
    wait = write_program(tmp_path, "wait.py", WAIT)
    with victim.client() as client:
        stopped, resumed = (started(client, wait) for _ in range(2))
        for run in (stopped, resumed):
            os.kill(run.pid, signal.SIGSTOP)
            run.send(b"go on")
        assert works(client, tmp_path)
        assert {i.id for i in client.inferlets()} == {stopped.id, resumed.id}
        os.kill(resumed.pid, signal.SIGCONT)
        assert resumed.result(DEADLINE).code == 0
        assert client.stop(stopped.id) == [stopped.id]
        result = stopped.result(DEADLINE)
        assert result.reason is not None and result.reason.code == "stopped"


def test_a_stopped_host_is_named(victim: Server, tmp_path: Path) -> None:
    host = victim.process
    with victim.client() as client:
        run = started(client, write_program(tmp_path, "wait.py", WAIT))
        host.send_signal(signal.SIGSTOP)
        try:
            listing = victim.terminal.start("ps")
            launch = victim.terminal.start("launch", tmp_path / "wait.py")
            for process in (listing, launch):
                _, err = process.communicate(timeout=DEADLINE)
                assert process.returncode == 125, err
                assert f"process {host.pid}, is stopped".encode() in err
                assert f"kill -CONT {host.pid}".encode() in err
        finally:
            host.send_signal(signal.SIGCONT)
        run.send(b"go on")
        assert run.result(DEADLINE).code == 0, "it blames nobody for its own absence"


# --- killed while it starts others -------------------------------------------------------------


def test_a_launcher_killed_between_fork_and_exec_leaves_no_orphan(
    victim: Server, tmp_path: Path
) -> None:
    native = compile_c(tmp_path, "lonely", SLEEP)
    script = write_program(tmp_path, "wait.py", WAIT)
    with victim.client() as client:
        for delay in range(6):
            assert works(client, tmp_path)  # both have started
            started(client, native).cancel()
            children = client.stats().children
            runs = [client.launch(path) for _ in range(6) for path in (native, script)]
            client.pump(delay * 0.001)
            for name in ("launcher", "zygote"):
                os.kill(children[name], signal.SIGKILL)
            for run in runs:
                run.cancel()  # some may have come to the next launcher
            for run in runs:
                reason = run.result(DEADLINE).reason
                assert reason is not None and reason.code in ("launcher_lost", "cancelled")
        assert eventually(lambda: not _orphans(native.name))
        assert works(client, tmp_path)


def _orphans(program: str) -> list[psutil.Process]:
    """Inferlets and halves of them (forks of a launcher) that no launcher or host started."""
    ours = ("pie-host", "pie-launcher", "pie-zygote")
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() not in (*ours[1:], program):
                continue
            if psutil.Process(process.ppid()).name() not in ours:
                found.append(process)
    return found


# --- descriptors used up -----------------------------------------------------------------------


def test_a_host_without_descriptors_refuses_new_work_only(tmp_path: Path) -> None:
    """At each stage of a launch: `spare` is how many more it may open."""
    wait = write_program(tmp_path, "wait.py", WAIT)
    with (
        new_terminal() as terminal,
        terminal.server(*SCRIPTED) as server,
        server.client() as client,
    ):
        host = server.process.pid
        limits = resource.prlimit(host, resource.RLIMIT_NOFILE)
        run = started(client, wait)
        assert eventually(lambda: has_its_group(client, run)), "which takes descriptors too"
        before = client.stats().children
        refused = 0
        # 14 suffice for a launch, but not for the rings that every 16th makes ahead
        for spare in (0, 1, 4, 8, 12, *[14] * 18):
            _leave(host, spare)
            later = client.launch(wait)
            later.send(b"go on")
            try:
                assert later.result(DEADLINE).code == 0
                assert spare > 12
            except FailedAnswer as error:
                assert "Too many open files" in error.reason.why
                refused += 1
            finally:
                resource.prlimit(host, resource.RLIMIT_NOFILE, limits)
        assert refused >= 5
        for _ in range(40):  # more than the rings that are made ahead
            later = client.launch(wait)
            later.send(b"go on")
            assert later.result(DEADLINE).code == 0
        run.send(b"go on")
        assert run.result(DEADLINE).code == 0
        assert client.stats().children == before


def _leave(pid: int, spare: int) -> None:
    """Lowers the limit so that the process has only so many free descriptors below it."""
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    free = (number for number in range(1 << 20) if number not in used)
    limit = next(itertools.islice(free, spare, None))
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, hard))


def test_a_backend_that_cannot_start_again_is_tried_until_it_can(tmp_path: Path) -> None:
    with (
        new_terminal() as terminal,
        terminal.server(*SCRIPTED) as server,
        server.client() as client,
    ):
        assert works(client, tmp_path)
        host, backend = server.process.pid, server.child("backend")
        limits = resource.prlimit(host, resource.RLIMIT_NOFILE)
        resource.prlimit(host, resource.RLIMIT_NOFILE, (3, limits[1]))  # whatever it closes
        os.kill(backend, signal.SIGKILL)
        assert server.process.stderr is not None
        for _ in range(2):
            while b"cannot start backend" not in (line := server.process.stderr.readline()):
                assert line, "it has ended"
            assert b"Too many open files" in line and b"trying again" in line
        assert "backend" not in client.stats().children
        resource.prlimit(host, resource.RLIMIT_NOFILE, limits)
        assert works(client, tmp_path)


def test_more_clients_than_there_are_descriptors() -> None:
    with (
        new_terminal() as terminal,
        terminal.server(*SCRIPTED, descriptors=200) as server,
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(server.client()) for _ in range(25)]
        for client in clients:
            client.stats()
        with server.client() as one_more, pytest.raises(FailedAnswer, match="25 clients are"):
            one_more.stats()
        clients.pop().close()
        assert eventually(lambda: _is_served(server))


def _is_served(server: Server) -> bool:
    with server.client() as client, contextlib.suppress(FailedAnswer):
        return bool(client.stats().children)
    return False


# --- hangs -------------------------------------------------------------------------------------


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's processes look for modules nowhere near the folder they are started in."""
    path = os.pathsep.join(filter(None, (str(chaos.ROOT), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)


def watch(how: str, patience: Patience, computes: bool = False, debugger: bool = False) -> str:
    """The fault of a process that hangs that way; empty if none is found for a while."""

    async def run() -> str:
        ended = asyncio.Event()
        child: Child[ServiceToHost] = Child(
            "mute", "tests.mute_process", [how], ServiceToHost, lambda *_: None, ended.set,
            computes=computes,
        )  # fmt: skip
        child.reads = True
        watchdog = Watchdog(lambda: [] if child.ended else [child], patience)
        with contextlib.suppress(asyncio.TimeoutError), contextlib.ExitStack() as stack:
            if debugger:
                stack.enter_context(debugged(child.pid))
            never = computes or debugger
            await asyncio.wait_for(ended.wait(), 2.0 if never else DEADLINE)
        watchdog.close()
        child.close()
        return child.fault

    return asyncio.run(run())


@pytest.mark.usefixtures("importable")
def test_one_that_sleeps_over_its_answer_is_ended() -> None:
    assert "gave no answer and did nothing" in watch("sleeps", SOON)


@pytest.mark.usefixtures("importable")
def test_one_that_spins_over_its_answer_is_ended() -> None:
    assert "gave no answer in 0.3 s of processor time" in watch("spins", SOON)


@pytest.mark.usefixtures("importable")
def test_a_long_computation_is_no_hang() -> None:
    assert watch("spins", SOON, computes=True) == ""
    assert watch("compiles", SOON, computes=True) == ""


@pytest.mark.usefixtures("importable")
def test_one_in_a_debugger_does_not_hang() -> None:
    assert watch("sleeps", SOON, debugger=True) == ""


def test_pings_are_answered_by_whoever_receives() -> None:
    """Between messages, and without the receiver's knowing."""
    ends = socket.socketpair()
    ours: Link[ServiceToHost] = Link(ends[0], ServiceToHost)
    theirs: Link[ServiceToHost] = Link(ends[1], ServiceToHost)
    ours.send(Gone(1))
    ours.ping()
    ours.send(Gone(2))
    assert ours.pinged
    assert [message for message, _ in theirs.receive()] == [Gone(1), Gone(2)]
    assert ours.receive() == [] and not ours.pinged
    ours.close()
    theirs.close()


# --- all at once ---------------------------------------------------------------------------------


def test_random_faults_under_load() -> None:
    counts = chaos.run(seconds=3, seed=4, model="scripted", pause=0.4)
    assert counts["right"] and counts["touched"], counts
