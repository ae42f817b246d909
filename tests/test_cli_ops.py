"""What operators look at: ps, top, inspect, and the log."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from piehost.host.client import Client, Run

from .host_harness import (
    DEADLINE,
    PIEHOST,
    WAIT,
    Server,
    Terminal,
    compile_c,
    eventually,
    write_program,
)
from .raw_inferlet import write_raw
from .test_quota_live import SPIN, child_of

GENERATE = """
    from inferlet import Model, inferlet, receive, send


    @inferlet
    def main(model: Model):
        with model.context("The capital of France is") as context:
            for _ in context.generate(max_tokens=24):
                pass
            send("generated")
            receive().result()
"""


def launch(client: Client, program: Path, **launch: Any) -> Run:
    run = client.launch(program, **launch)
    assert eventually(lambda: bool(client.pump(0.01) or run.id))
    return run


def top(server: Server, *options: str) -> dict[str, Any]:
    document = json.loads(server.terminal.run("top", "--json", *options, check=0).stdout)
    assert isinstance(document, dict)
    return document


def test_what_takes_the_processor_is_first(server: Server, client: Client, tmp_path: Path) -> None:
    spins = launch(client, write_raw(tmp_path, "spin.py", SPIN), user="ada")
    sleeps = launch(client, write_program(tmp_path, "wait.py", WAIT))

    def spin_was_seen() -> bool:  # a busy machine may not have let it run in that time
        documents.append(top(server, "--interval", "0.3"))
        (row,) = [row for row in documents[-1]["inferlets"] if row["id"] == spins.id]
        return row["cpu_percent"] > 0

    documents: list[dict[str, Any]] = []
    assert eventually(spin_was_seen)
    document = documents[-1]
    rows = document["inferlets"]
    first = rows[0]
    assert first["id"] == spins.id and sleeps.id in {row["id"] for row in rows}
    assert first["cpu_percent"] > 0 and first["memory_bytes"] > 1 << 20
    assert (first["user"], first["program"], first["state"]) == ("ada", "spin", "running")
    assert document["host"]["inferlets"] == len(rows)
    assert document["host"]["pages_total"] == 2048
    assert document["host"]["launches"] >= 2 and document["host"]["seats"] >= 2


def test_top_prints_the_same_as_a_table(server: Server, client: Client, tmp_path: Path) -> None:
    spins = launch(client, write_raw(tmp_path, "spin.py", SPIN), user="ada")

    def spin_is_first() -> bool:
        table = server.terminal.run("top", "--once", "--interval", "0.2", check=0).stdout.decode()
        lines = table.splitlines()
        assert "inferlets" in lines[0] and "KV pages free" in lines[0]
        assert lines[1].split()[:3] == ["ID", "USER", "PROGRAM"]
        return lines[2].startswith(spins.id)

    assert eventually(spin_is_first)


def test_top_in_a_pipe_is_one_table(server: Server) -> None:
    table = server.terminal.run("top", check=0).stdout.decode()
    assert table.splitlines()[1].startswith("ID") and "\x1b" not in table


def test_top_on_a_terminal(server: Server, client: Client, tmp_path: Path) -> None:
    """It shows what comes, and Ctrl-C is how one leaves it."""
    pid, screen = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs ignore it
        command = [*PIEHOST, "top", "--interval", "0.1"]
        os.execvpe(command[0], command, {**server.terminal.environment, "TERM": "xterm"})
    shown = b""
    while b"KV pages free" not in shown:
        shown += os.read(screen, 4096)
    run = launch(client, write_program(tmp_path, "wait.py", WAIT))
    while run.id.encode() not in shown:
        shown += os.read(screen, 4096)
    os.write(screen, b"\x03")
    while True:
        try:
            if not os.read(screen, 4096):
                break
        except OSError:  # EIO: the other side is closed
            break
    os.close(screen)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_inspect_of_what_runs(server: Server, client: Client, tmp_path: Path) -> None:
    source = """
        if len(sys.argv) == 1:
            ask(SPAWN, 1, "", ["child"])
        say("ready")
        ask(RECEIVE)
    """
    program = write_raw(tmp_path, "parent.py", source)
    run = launch(
        client, program, user="ada", job="both", egress=["example.com"], quotas={"fds": "50"}
    )
    child = child_of(client, run)
    shown = json.loads(server.terminal.run("inspect", run.id, "--json", check=0).stdout)
    assert (shown["id"], shown["user"], shown["job"]) == (run.id, "ada", "both")
    assert shown["state"] == "running" and shown["pid"] == run.pid
    assert shown["children"] == [child] and shown["egress"] == ["example.com"]
    assert {"seccomp", "landlock"} <= set(shown["controls"]) and shown["waived"] == []
    hidden = not Path(f"/proc/{run.pid}/root/proc/self").exists()
    assert hidden == ("mounts" in shown["controls"])
    assert shown["profile"] == "python" and shown["reason"] is None
    quotas = shown["quotas"]
    assert quotas["fds"]["cap"] == 50 and quotas["fds"]["source"] == "--quota"
    assert quotas["children"]["used"] == 1 and quotas["threads"]["used"] == 1
    assert 8 <= quotas["fds"]["used"] < 50 and quotas["memory"]["used"] < 1 << 30
    assert quotas["address_space"]["used"] > shown["memory_bytes"] > 1 << 20
    assert 0 < quotas["wall_seconds"]["used"] < DEADLINE and quotas["wall_seconds"]["cap"] is None
    assert json.loads(server.terminal.run("inspect", child, "--json").stdout)["parent"] == run.id
    text = server.terminal.run("inspect", run.id, check=0).stdout.decode()
    for word in (run.id, child, "example.com", "landlock", "kv_pages", "tokens out"):
        assert word in text


def test_inspect_shows_what_it_holds(server: Server, client: Client, tmp_path: Path) -> None:
    run = launch(client, write_program(tmp_path, "generate.py", GENERATE))
    next(event for event in run.events() if getattr(event, "data", b"") == b"generated")
    found = client.inspect(run.id)
    assert found.info is not None and found.details is not None
    held = {key: use.used for key, use in found.details.quotas.items()}
    assert held["kv_pages"] == found.info.stats.kv_pages > 0
    assert 0 < found.info.stats.tokens_out <= 24
    (row,) = [row for row in top(server, "--sort", "tokens")["inferlets"] if row["id"] == run.id]
    assert row["kv_pages"] == held["kv_pages"] and row["tokens_per_second"] == 0


def test_how_it_ended_is_remembered(server: Server, client: Client, tmp_path: Path) -> None:
    quick = client.launch(write_raw(tmp_path, "quick.py", "sys.exit(3)")).result(DEADLINE)
    slow = launch(client, write_raw(tmp_path, "spin.py", SPIN), quotas={"wall_seconds": "1"})
    assert slow.result(DEADLINE).code == 137
    terminal = server.terminal
    listed = json.loads(terminal.run("ps", "--all", "--json", check=0).stdout)
    ended = [info for info in listed if info["state"] == "ended"]
    last, before = [info for info in ended if info["id"] in (slow.id, quick.id)]
    assert (last["id"], last["code"]) == (slow.id, 137), "the latest first"
    reason = last["reason"]
    assert reason["code"] == "wall_seconds" and "wall_seconds is 1" in reason["why"]
    assert (before["id"], before["code"], before["reason"]) == (quick.id, 3, None)
    table = terminal.run("ps", "--all", check=0).stdout.decode()
    (row,) = [line for line in table.splitlines() if line.startswith(f"{slow.id} ")]
    assert row.split()[-2:] == ["137", "wall_seconds"]

    text = terminal.run("inspect", slow.id, check=0).stdout.decode()
    assert "ran out of time" in text and "137" in text
    found = json.loads(terminal.run("inspect", slow.id, "--json", check=0).stdout)
    assert found["state"] == "ended" and found["usage"]["max_rss_bytes"] > 1 << 20
    assert b"nobody-1" in terminal.run("inspect", "nobody-1", check=127).stderr


def test_only_the_last_are_remembered(client: Client, tmp_path: Path) -> None:
    program = write_raw(tmp_path, "quick.py", "")
    runs = [client.launch(program) for _ in range(66)]
    ids = [run.result(DEADLINE).id for run in runs]
    ended = [info.id for info in client.listing(ended=True).ended]
    assert len(ended) == 64 and set(ended) <= set(ids)


def test_a_file_that_grows_too_large(client: Client, tmp_path: Path) -> None:
    """The default for programs that are no scripts is no file at all; ring in is one."""
    source = """
        #include <unistd.h>
        int main(void) { return write(5, "x", 1) == 1 ? 0 : 1; }
    """
    result = client.launch(compile_c(tmp_path, "writer", source)).result(DEADLINE)
    assert result.reason is not None and result.reason.code == "file_size"
    assert "file_size is 0" in result.reason.why and result.code == 128 + signal.SIGXFSZ


def test_the_log_says_what_ended_why(terminal: Terminal, tmp_path: Path) -> None:
    spin = write_raw(tmp_path, "spin.py", SPIN)
    with terminal.server("--model", "scripted") as server, server.client() as client:
        assert server.process.stderr is not None
        stopped = launch(client, spin)
        client.stop(stopped.id)
        stopped.result(DEADLINE)
        run = launch(client, spin, user="ada", quotas={"wall_seconds": "1"})
        client.set_quota(run.id, {"cpu_seconds": "500"})
        assert run.result(DEADLINE).code == 137
        lines = [server.process.stderr.readline().decode() for _ in range(2)]
    assert lines[0] == f"piehost: {run.id} (ada) has other quotas: cpu_seconds=500\n"
    assert re.match(rf"piehost: {run.id} \(ada\) ended: wall_seconds: .* is 1$", lines[1])


def test_names_move_no_cursor(server: Server, client: Client, tmp_path: Path) -> None:
    launch(client, write_raw(tmp_path, "\x1b[2Jred.py", SPIN))
    shown = server.terminal.run("ps", check=0).stdout
    assert b"[2Jred.py" in shown and b"\x1b" not in shown


def test_a_log_that_nobody_reads_holds_up_nothing(terminal: Terminal, tmp_path: Path) -> None:
    """Its pipe is full long before."""
    with terminal.server("--model", "scripted") as server, server.client() as client:
        run = launch(client, write_program(tmp_path, "wait.py", WAIT))
        for number in range(1000):
            client.set_quota(run.id, {"priority": str(number % 9), "share": "9", "children": "1"})
        assert client.inferlets()[0].id == run.id


@pytest.mark.parametrize("verb", [("ps",), ("top",), ("inspect", "x-1"), ("stop", "--all"),
    ("quota", "show", "x-1"), ("quota", "set", "x-1", "fds=40")])  # fmt: skip
def test_without_a_server(terminal: Terminal, verb: tuple[str, ...]) -> None:
    for options in ((), ("--json",)):
        done = terminal.run(*verb, *options, check=125)
        assert b"no server listens" in done.stderr and b"piehost serve" in done.stderr
        assert done.stdout == b""


def test_debug_before_and_behind_the_verb(terminal: Terminal, tmp_path: Path) -> None:
    for words in (("--debug", "ps"), ("ps", "--debug"), ("quota", "show", "x-1", "--debug")):
        done = terminal.run(*words)
        assert b"Traceback" in done.stderr and b"no server listens" in done.stderr
    assert b"Traceback" not in terminal.run("ps").stderr
    program = write_raw(tmp_path, "args.py", "say(sys.argv[1:])")
    done = terminal.run("launch", "--model", "scripted", program, "--", "--debug", check=0)
    assert done.stdout == b"['--debug']\n", "the program's own"
