"""However a launch, a client or a host ends: no process, socket or folder of it is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from .host_harness import (
    DEADLINE,
    SCRIPTED,
    SMALL,
    WAIT,
    Server,
    Terminal,
    all_gone,
    eventually,
    family,
    write_program,
)


@contextlib.contextmanager
def ephemeral(
    terminal: Terminal, tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """A launch with a host of its own whose inferlet waits, and all its processes: the CLI, the
    host, its four, the inferlet."""
    path = write_program(tmp_path, "wait.py", WAIT)
    process = terminal.start_ready("launch", *SCRIPTED, path)
    everyone = family(process.pid)
    try:
        assert len(everyone) == 7, everyone
        yield process, everyone
    finally:
        for left in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.communicate(timeout=DEADLINE)


def left_behind(terminal: Terminal) -> list[str]:
    return [path.name for path in terminal.run_dir.iterdir()]


def test_normal_end_of_an_ephemeral_launch(terminal: Terminal, tmp_path: Path) -> None:
    with ephemeral(terminal, tmp_path) as (process, everyone):
        process.communicate(b"go\n", DEADLINE)
        assert process.returncode == 0
        assert all_gone(everyone)  # at once: the CLI waits for its host
        assert left_behind(terminal) == []


def test_interrupt_of_an_ephemeral_launch(terminal: Terminal, tmp_path: Path) -> None:
    with ephemeral(terminal, tmp_path) as (process, everyone):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the foreground group
        _, err = process.communicate(timeout=DEADLINE)
        assert process.returncode == 130
        assert b"Traceback" not in err
        assert all_gone(everyone)
        assert left_behind(terminal) == []


def test_killed_cli(terminal: Terminal, tmp_path: Path) -> None:
    with ephemeral(terminal, tmp_path) as (process, everyone):
        process.kill()
        process.wait(DEADLINE)
        assert eventually(lambda: all_gone(everyone))
        assert eventually(lambda: left_behind(terminal) == [])


def test_killed_cli_while_the_model_loads(terminal: Terminal, tmp_path: Path) -> None:
    process = terminal.start("launch", *SMALL, write_program(tmp_path, "wait.py", WAIT))
    assert eventually(lambda: len(family(process.pid)) >= 5)
    everyone = family(process.pid)
    process.kill()
    process.communicate(timeout=DEADLINE)
    assert eventually(lambda: all_gone(everyone))
    assert eventually(lambda: left_behind(terminal) == [])


def test_killed_ephemeral_host(terminal: Terminal, tmp_path: Path) -> None:
    with ephemeral(terminal, tmp_path) as (process, everyone):
        (host,) = (p for p in everyone if p.name() == "pie-host")
        host.kill()
        _, err = process.communicate(timeout=DEADLINE)
        assert process.returncode == 125
        assert b"the host process died" in err and b"try:" in err
        assert eventually(lambda: all_gone(everyone))
    assert len(left_behind(terminal)) == 1  # nobody was left to remove its folder
    path = write_program(tmp_path, "hello.py", "print('hello')")
    terminal.run("launch", *SCRIPTED, path, check=0)
    assert left_behind(terminal) == []  # but the next host does


def test_killed_server(terminal: Terminal, tmp_path: Path) -> None:
    path = write_program(tmp_path, "wait.py", WAIT)
    with terminal.server(*SCRIPTED) as server:
        launch = terminal.start_ready("launch", path)
        everyone = family(server.process.pid)
        server.process.kill()
        _, err = launch.communicate(timeout=DEADLINE)
        assert launch.returncode == 125 and b"the host process died" in err
        assert eventually(lambda: all_gone(everyone))
    assert terminal.socket.exists()  # stale
    with terminal.server(*SCRIPTED) as server, server.client() as client:  # and no obstacle
        assert client.inferlets() == []
    assert left_behind(terminal) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_client_of_a_server_that_dies(server: Server, tmp_path: Path, number: int) -> None:
    path = write_program(tmp_path, "wait.py", WAIT)
    launch = server.terminal.start_ready("launch", path)
    with server.client() as client:
        (inferlet,) = client.inferlets()
        process = psutil.Process(inferlet.pid)
        launch.send_signal(number)
        launch.communicate(timeout=DEADLINE)
        assert eventually(lambda: all_gone([process]))
        assert eventually(lambda: client.inferlets() == [])


def test_inferlet_has_exactly_its_descriptors(server: Server, tmp_path: Path) -> None:
    path = write_program(tmp_path, "wait.py", WAIT)
    with server.client() as client:
        run = client.launch(path)
        next(run.events())
        descriptors = sorted(int(fd) for fd in os.listdir(f"/proc/{run.pid}/fd"))
        assert descriptors == list(range(8))
        environment = Path(f"/proc/{run.pid}/environ").read_bytes()
        assert b"XDG_RUNTIME_DIR" not in environment
        for ring in (4, 5):
            assert os.stat(f"/proc/{run.pid}/fd/{ring}").st_size >= 1 << 20
