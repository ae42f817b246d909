"""`serve`, and the verbs that ask it: ps, stop, models."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
from pathlib import Path

import psutil

from .host_harness import (
    DEADLINE,
    PIEHOST,
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

HOST_NAMES = {"pie-host", "pie-backend", "pie-controller", "pie-launcher", "pie-zygote"}


def test_second_server_on_the_same_socket_is_refused(server: Server) -> None:
    done = server.terminal.run("serve", check=125)
    error = done.stderr.decode()
    assert "already listens" in error and str(server.process.pid) in error
    assert server.terminal.run("models", "--json", check=0).stdout  # the first goes on


def test_socket_is_for_its_owner_only(server: Server) -> None:
    assert server.socket.stat().st_mode & 0o777 == 0o600
    assert server.terminal.run_dir.stat().st_mode & 0o777 == 0o700


def test_launch_uses_the_running_server(server: Server, tmp_path: Path) -> None:
    path = write_program(tmp_path, "wait.py", WAIT)
    process = server.terminal.start_ready("launch", path)
    assert family(process.pid)[1:] == []  # no host of its own
    process.communicate(b"go\n", DEADLINE)
    assert process.returncode == 0


def test_launch_with_the_servers_own_options_uses_it(server: Server, tmp_path: Path) -> None:
    path = write_program(tmp_path, "wait.py", WAIT)
    process = server.terminal.start_ready("launch", "--model", "default", "--kv-pages", 2048, path)
    assert family(process.pid)[1:] == []
    process.communicate(b"go\n", DEADLINE)


def test_launch_with_other_options_has_a_host_of_its_own(
    terminal: Terminal, tmp_path: Path
) -> None:
    source = "from inferlet.runtime import runtime\nprint(runtime.startup.models[0].page_size)"
    path = write_program(tmp_path, "page_size.py", source)
    options = ("--page-size", 8, *SCRIPTED, *SMALL)
    with terminal.server(*SCRIPTED) as server:
        assert terminal.run("launch", *options, path, check=0).stdout == b"8\n"
        assert terminal.run("launch", path, check=0).stdout == b"16\n"
        done = terminal.run("launch", "--socket", server.socket, *options, path, check=125)
    assert b"page_size" in done.stderr


def test_ps_and_stop(server: Server, tmp_path: Path) -> None:
    terminal = server.terminal
    path = write_program(tmp_path, "wait.py", WAIT)
    process = terminal.start_ready("launch", path)
    (listed,) = json.loads(terminal.run("ps", "--json", check=0).stdout)
    assert listed["program"] == str(path) and listed["state"] == "running"
    assert listed["client_pid"] == process.pid
    assert psutil.pid_exists(listed["pid"])
    table = terminal.run("ps", check=0).stdout.decode()
    assert table.startswith("ID") and listed["id"] in table and str(path) in table

    stopped = terminal.run("stop", listed["id"], "--json", check=0).stdout
    assert json.loads(stopped) == {"stopped": [listed["id"]]}
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + signal.SIGKILL
    assert b"stopped by `piehost stop`" in err
    assert json.loads(terminal.run("ps", "--json", check=0).stdout) == []


def test_stop_all(server: Server, tmp_path: Path) -> None:
    path = write_program(tmp_path, "wait.py", WAIT)
    with server.client() as client:
        runs = [client.launch(path) for _ in range(3)]
        assert eventually(lambda: len(client.inferlets()) == 3)
        assert len(server.terminal.run("stop", "--all", check=0).stdout.split()) == 3
        for run in runs:
            reason = run.result(DEADLINE).reason
            assert reason is not None and reason.code == "stopped"


def test_stop_of_an_unknown_id(server: Server) -> None:
    done = server.terminal.run("stop", "nobody-1", check=127)
    assert b"no inferlet nobody-1" in done.stderr
    assert b"Usage" in server.terminal.run("stop", check=2).stderr


def test_models(server: Server) -> None:
    (model,) = json.loads(server.terminal.run("models", "--json", check=0).stdout)
    assert model["name"] == "default" and model["state"] == "loaded"
    assert model["page_size"] == 16 and model["max_context"] >= 2048
    assert model["options"]["kv_pages"] == "2048"
    table = server.terminal.run("models", check=0).stdout.decode().splitlines()
    assert table[0].startswith("NAME") and table[1].startswith("default")
    assert not any(mark in "".join(table) for mark in "|│┃─")


def test_verbs_without_a_server(terminal: Terminal) -> None:
    assert b"no server" in terminal.run("stop", "x-1", check=125).stderr
    (model,) = json.loads(terminal.run("models", "--json", check=0).stdout)
    assert model["name"] == "default" and "not loaded" in model["state"]


def test_operators_quota_is_a_default_and_a_ceiling(terminal: Terminal, tmp_path: Path) -> None:
    source = "from inferlet.runtime import runtime\nprint(runtime.startup.limits.kv_pages)"
    path = write_program(tmp_path, "limits.py", source)
    with terminal.server(*SCRIPTED, "--quota", "kv_pages=100"):
        assert terminal.run("launch", path, check=0).stdout == b"100\n"
        assert terminal.run("launch", "--quota", "kv_pages=50", path, check=0).stdout == b"50\n"
        done = terminal.run("launch", "--quota", "kv_pages=101", path, check=126)
        assert b"ceiling of 100" in done.stderr


def test_interrupt_ends_the_server_and_all_it_runs(terminal: Terminal, tmp_path: Path) -> None:
    path = write_program(tmp_path, "wait.py", WAIT)
    with terminal.server(*SCRIPTED) as server:
        launch = terminal.start_ready("launch", path)
        everyone = family(server.process.pid)
        assert {p.name() for p in everyone} >= HOST_NAMES and len(everyone) == 6
        os.kill(server.process.pid, signal.SIGINT)
        _, err = server.process.communicate(timeout=DEADLINE)
        assert server.process.returncode == 0 and b"Traceback" not in err
        assert all_gone(everyone)
        _, err = launch.communicate(timeout=DEADLINE)
        assert launch.returncode == 125 and b"shutting down" in err
    assert list(terminal.run_dir.iterdir()) == []


def test_launch_waits_for_a_server_that_loads(terminal: Terminal, tmp_path: Path) -> None:
    path = write_program(tmp_path, "hello.py", "print('hello')")
    process = terminal.start("serve", *SMALL)
    try:
        assert eventually(lambda: terminal.socket.exists())
        assert terminal.run("launch", path, check=0).stdout == b"hello\n"
    finally:
        process.terminate()
        process.communicate(timeout=DEADLINE)


def test_server_at_a_socket_of_the_users_choice(terminal: Terminal, tmp_path: Path) -> None:
    path = write_program(tmp_path, "hello.py", "print('hello')")
    socket = terminal.directory / "mine.sock"
    terminal.environment["PIEHOST_SOCKET"] = str(socket)
    with terminal.server(*SCRIPTED):
        assert socket.is_socket()
        assert terminal.run("launch", path, check=0).stdout == b"hello\n"
        (model,) = json.loads(terminal.run("models", "--json", check=0).stdout)
        assert model["state"] == "loaded"
        del terminal.environment["PIEHOST_SOCKET"]
        (model,) = json.loads(terminal.run("models", "--json", check=0).stdout)
        assert model["state"] != "loaded"
        again = terminal.run("launch", "--socket", socket, path, check=0)
        assert again.stdout == b"hello\n"
    assert not socket.exists()


def test_server_whose_model_cannot_be_loaded(terminal: Terminal, tmp_path: Path) -> None:
    done = terminal.run("serve", "--model", tmp_path, check=125)
    assert b"cannot load the model" in done.stderr and b"try:" in done.stderr
    assert b"Traceback" not in done.stderr and done.stdout == b""
    assert list(terminal.run_dir.iterdir()) == []


def test_progress_is_for_terminals_only(terminal: Terminal, tmp_path: Path) -> None:
    path = write_program(tmp_path, "hello.py", "print('hello')")
    assert terminal.run("launch", *SMALL, path, check=0).stderr == b""
    pid, shown_at = pty.fork()
    if pid == 0:
        command = [*PIEHOST, "launch", *SMALL, str(path)]
        os.execvpe(command[0], command, {**terminal.environment, "TERM": "xterm"})
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other side is closed
        while data := os.read(shown_at, 4096):
            shown += data
    os.close(shown_at)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert b"%" in shown and b"hello\r\n" in shown
