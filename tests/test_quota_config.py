"""piehost.toml: what the operator gives users and programs."""

from __future__ import annotations

import os
import pty
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from piehost.host.client import Client
from piehost.host.errors import HostError

from .host_harness import (
    DEADLINE,
    PIEHOST,
    WAIT,
    Server,
    Terminal,
    all_gone,
    eventually,
    family,
    new_terminal,
    write_program,
)
from .raw_inferlet import write_raw

SCRIPTED = ("--model", "scripted")
CONFIG = """
egress = ["*.example.com"]

[quota]
kv_pages = 100
children = 3
cpu_seconds = 50

[user.ada]
quota = {kv_pages = 200}
egress = ["example.org"]

[user.bob.quota]
cpu_seconds = "none"
share = 300

[program.big.quota]
kv_pages = 300
fds = 40
"""
SHOW = """
    if len(sys.argv) > 1:
        ask(SPAWN, 1, "", [])
        say(ask(RECEIVE_CHILD, 1).decode())
        sys.exit(0)
    left = ask(QUOTA)
    told = startup["limits"]
    say(f"{told['kv_pages']} {told['children']} {left.get('cpu_seconds', -1)}")
"""


@pytest.fixture(scope="module")
def operated() -> Iterator[Server]:
    """A server with a configuration in the usual place."""
    with new_terminal() as terminal:
        path = write_config(terminal, CONFIG)
        assert path.is_file()
        with terminal.server(*SCRIPTED, "--quota", "children=2") as server:
            yield server


@pytest.fixture
def connected(operated: Server) -> Iterator[Client]:
    with operated.client() as client:
        yield client


def write_config(terminal: Terminal, text: str) -> Path:
    path = terminal.directory / "config" / "piehost" / "piehost.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def limits(client: Client, program: Path, *args: str, **launch: Any) -> list[float]:
    """What the program is told: kv_pages, children, cpu_seconds left (-1: no end)."""
    result = client.launch(program, args, **launch).result(DEADLINE)
    assert result.code == 0, result
    return [float(word) for word in result.text.split()]


def test_the_more_specific_table_wins(connected: Client, tmp_path: Path) -> None:
    small, big = (write_raw(tmp_path, name, SHOW) for name in ("small.py", "big.py"))
    assert limits(connected, small)[0] == 100
    assert limits(connected, small, user="ada")[0] == 200
    assert limits(connected, big)[0] == 300
    assert limits(connected, big, user="ada")[0] == 300
    assert 49 < limits(connected, small, user="ada")[2] <= 50, "the others are of the wider table"
    assert limits(connected, small, user="bob")[2] == -1
    assert limits(connected, small)[1] == limits(connected, big, user="ada")[1] == 2, (
        "serve --quota"
    )


def test_children_have_what_the_launched_program_has(connected: Client, tmp_path: Path) -> None:
    assert limits(connected, write_raw(tmp_path, "big.py", SHOW), "parent")[0] == 300


@pytest.mark.parametrize(
    ("user", "quota", "where"),
    [
        ("", "kv_pages=101", "piehost.toml [quota]"),
        ("ada", "kv_pages=201", "piehost.toml [user.ada.quota]"),
        ("", "cpu_seconds=none", "piehost.toml [quota]"),
        ("ada", "children=3", "piehost serve --quota"),
        ("", "share=101", "default"),
        ("bob", "share=301", "piehost.toml [user.bob.quota]"),
    ],
)
def test_no_launch_goes_beyond_it(
    connected: Client, tmp_path: Path, user: str, quota: str, where: str
) -> None:
    program = write_raw(tmp_path, "small.py", SHOW)
    key, _, value = quota.partition("=")
    with pytest.raises(HostError, match="ceiling") as refused:
        connected.launch(program, [], {key: value}, user=user).result(DEADLINE)
    reason = refused.value.reason
    assert where in reason.why and "--quota" in reason.why and key in reason.hint
    lower = {"kv_pages": "99", "cpu_seconds": "9", "children": "1", "share": "1"}[key]
    limits(connected, program, quotas={key: lower}, user=user)


def test_no_manifest_goes_beyond_it(connected: Client, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)  # it may run as a user of its own
    write_raw(tmp_path, "main.py", SHOW)
    manifest = tmp_path / "inferlet.toml"
    manifest.write_text('entry = "main.py"\n[quota]\nkv_pages = 100\n')
    assert limits(connected, tmp_path)[0] == 100
    manifest.write_text('entry = "main.py"\n[quota]\nkv_pages = 101\n')
    with pytest.raises(HostError, match="ceiling of 100") as refused:
        connected.launch(tmp_path).result(DEADLINE)
    assert "inferlet.toml" in refused.value.reason.why
    manifest.write_text(f'entry = "main.py"\n[quota]\nkv_pages = 0x{"f" * 5000}\n')
    with pytest.raises(HostError, match="more than 64 bits"):
        connected.launch(tmp_path).result(DEADLINE)


def test_where_it_lets_http_go(connected: Client, tmp_path: Path) -> None:
    program = write_raw(tmp_path, "small.py", SHOW)
    limits(connected, program, egress=["a.example.com"])
    limits(connected, program, egress=["example.org"], user="ada")
    for user, grant in (("", "example.org"), ("ada", "a.example.com")):
        with pytest.raises(HostError, match="lets no inferlet reach") as refused:
            connected.launch(program, egress=[grant], user=user).result(DEADLINE)
        assert "piehost.toml" in refused.value.reason.why


def test_it_shows_where_a_quota_comes_from(operated: Server, tmp_path: Path) -> None:
    with operated.client() as client:
        run = client.launch(write_program(tmp_path, "big.py", WAIT), [], {"embeds": "7"})
        assert eventually(lambda: bool(client.pump(0) or run.id))
        table = operated.terminal.run("quota", "show", run.id, check=0).stdout.decode()
    rows = {line.split()[0]: line for line in table.splitlines()}
    assert "300" in rows["kv_pages"] and "piehost.toml [program.big.quota]" in rows["kv_pages"]
    assert "40" in rows["fds"] and "[program.big.quota]" in rows["fds"]
    assert "piehost serve --quota" in rows["children"]
    assert "7" in rows["embeds"] and "--quota" in rows["embeds"] and "default" in rows["history"]


def test_hang_up_reads_it_again(terminal: Terminal, tmp_path: Path) -> None:
    program = write_raw(tmp_path, "small.py", SHOW)
    path = write_config(terminal, "[quota]\nkv_pages = 100\n")
    with terminal.server(*SCRIPTED) as server, server.client() as client:
        assert server.process.stderr is not None
        runs = client.launch(write_program(tmp_path, "wait.py", WAIT))
        assert eventually(lambda: bool(client.pump(0) or runs.id))
        path.write_text("[quota]\nkv_pages = 70\n")
        assert limits(client, program)[0] == 100, "not before it is told"
        server.process.send_signal(signal.SIGHUP)
        assert b"read again" in server.process.stderr.readline()
        assert limits(client, program)[0] == 70
        details = client.inspect(runs.id).details
        assert details is not None and details.quotas["kv_pages"].cap == 100, "what runs keeps its"
        path.write_text("[quota]\nkv_pages = 1e9\n")
        server.process.send_signal(signal.SIGHUP)
        line = server.process.stderr.readline()
        assert b"kv_pages" in line and str(path).encode() in line and b"stays" in line
        assert limits(client, program)[0] == 70, "the old one stays"


@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_ends_the_server(terminal: Terminal, nohup: bool) -> None:
    """SIGHUP of a terminal that goes away is no wish to read the configuration."""
    pid, screen = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
        command = [*PIEHOST, "serve", *SCRIPTED]
        os.execvpe(command[0], command, terminal.environment)
    shown = b""
    while b"serving" not in shown:
        shown += os.read(screen, 4096)
    everyone = family(pid)
    os.close(screen)
    if nohup:
        terminal.run("ps", check=0)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        os.kill(pid, signal.SIGTERM)
    assert os.WIFEXITED(os.waitpid(pid, 0)[1])
    assert eventually(lambda: all_gone(everyone))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kv_pages = 1", "kv_pages"),
        ("[quota]\nkv_pagez = 1", "kv_pagez"),
        ("[quota]\nkv_pages = 1.5", "kv_pages"),
        ("[quota]\nkv_pages = true", "kv_pages"),
        ("[quota]\nkv_pages = -1", "kv_pages"),
        ("[quota]\nkv_pages = 'none'", "kv_pages"),
        pytest.param(f"[quota]\nkv_pages = 0x{'f' * 5000}", "64 bits", id="huge"),
        ("[quota]\ncpu = '1.5'", "cpu"),
        ("quota = 1", "quota"),
        ("[quota\nx = 1", "line 1"),
        ("[user.ada.quota]\nfds = 'many'", "[user.ada.quota]"),
        ("[user.ada]\nquotas = {}", "quotas"),
        ("[program.x]\negress = ['a b']", "[program.x]"),
        ("egress = 'example.com'", "egress"),
        ("[users.ada.quota]", "users"),
    ],
)
def test_a_wrong_file(terminal: Terminal, tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    done = terminal.run("serve", *SCRIPTED, "--config", path, check=125)
    error = done.stderr.decode()
    assert str(path) in error and says in error and "try:" in error and "Traceback" not in error
    assert done.stdout == b"" and list(terminal.run_dir.iterdir()) == []


def test_a_file_that_cannot_be_read(terminal: Terminal, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "octets").write_bytes(b"\xff\xfe")
    for name, says in (("nothing", b"No such file"), ("pipe", b"regular"), ("octets", b"utf-8")):
        done = terminal.run("serve", *SCRIPTED, "--config", tmp_path / name, check=125)
        assert says in done.stderr and b"try:" in done.stderr


def test_a_launch_without_a_server_keeps_to_it(terminal: Terminal, tmp_path: Path) -> None:
    program = write_raw(tmp_path, "small.py", SHOW)
    path = write_config(terminal, "[quota]\nkv_pages = 60\n")
    done = terminal.run("launch", *SCRIPTED, program, check=0)
    assert done.stdout.startswith(b"60 ")
    path.write_text("[quota]\nkv_pagez = 60\n")
    done = terminal.run("launch", *SCRIPTED, program, check=125)
    assert b"kv_pagez" in done.stderr and str(path).encode() in done.stderr


def test_the_file_named_wins_over_the_usual_one(terminal: Terminal, tmp_path: Path) -> None:
    write_config(terminal, "[quota]\nkv_pages = 60\n")
    (tmp_path / "mine.toml").write_text("[quota]\nkv_pages = 50\n")
    options = (*SCRIPTED, "--config", tmp_path / "mine.toml")
    with terminal.server(*options) as server, server.client() as client:
        assert limits(client, write_raw(tmp_path, "small.py", SHOW))[0] == 50
