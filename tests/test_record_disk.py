"""The file that a recorded launch writes: private, never over another; whole, or why it is not."""

from __future__ import annotations

import resource
import stat
from pathlib import Path

import psutil
import pytest

from piehost.host.errors import HostError
from piehost.host.recording import Recording
from piehost.wire import client as wire
from piehost.wire.recording import Written

from . import record_harness
from .host_harness import DEADLINE, WAIT, Server, Terminal, write_program
from .record_harness import COUNT, record, replay

terminal = record_harness.terminal  # the fixture


def test_the_file_is_private_and_never_replaces_another(terminal: Terminal, tmp_path: Path) -> None:
    path = tmp_path / "run.pie"
    program = write_program(tmp_path, "count.py", COUNT)
    record(terminal, path, program)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    done = terminal.run("launch", "--record", path, program, check=125)
    assert b"it is there already" in done.stderr and b"try:" in done.stderr
    assert path.read_bytes() == before
    done = terminal.run("launch", "--record", tmp_path / "no" / "run.pie", program, check=125)
    assert b"cannot record in" in done.stderr and b"No such file or directory" in done.stderr


def test_a_launch_that_is_refused_leaves_no_file(terminal: Terminal, tmp_path: Path) -> None:
    program = write_program(tmp_path, "count.py", COUNT)
    arguments = ("--record", tmp_path / "run.pie", program)
    terminal.run("launch", "--quota", "address_space=16MiB", *arguments, check=126)
    assert not (tmp_path / "run.pie").exists()


def test_what_it_printed_is_in_the_recording(terminal: Terminal, tmp_path: Path) -> None:
    source = "import sys; print('out'); print('err', file=sys.stderr)"
    program = write_program(tmp_path, "prints.py", source)
    record(terminal, tmp_path / "run.pie", program)
    written = [e for e in Recording(str(tmp_path / "run.pie")).events() if isinstance(e, Written)]
    assert sorted((e.stream, e.data) for e in written) == [(1, b"out\n"), (2, b"err\n")]
    done = replay(terminal, tmp_path / "run.pie", program)
    assert done.stdout == b"out\n" and done.stderr.startswith(b"err\n")


def test_a_full_disk_ends_the_run_with_a_reason(server: Server, tmp_path: Path) -> None:
    source = """
        from inferlet import Model, flush, inferlet, receive, send

        @inferlet
        def main(model: Model):
            for number in range(400):
                send(b"x" * 50000)
            flush()
            receive().result()
    """
    program = write_program(tmp_path, "much.py", source)
    host = psutil.Process(server.process.pid)
    limit = host.rlimit(resource.RLIMIT_FSIZE)
    host.rlimit(resource.RLIMIT_FSIZE, (8 << 20, limit[1]))
    try:
        with server.client() as client:
            result = client.launch(program, record=tmp_path / "run.pie").result(DEADLINE)
    finally:
        host.rlimit(resource.RLIMIT_FSIZE, limit)
    assert result.reason is not None and result.reason.code == "recording"
    assert "File too large" in result.reason.why and result.reason.hint
    with pytest.raises(HostError, match="cut off"):
        Recording(str(tmp_path / "run.pie"))
    with server.client() as client:
        assert client.launch(write_program(tmp_path, "count.py", COUNT)).result().code == 0


def test_a_disk_that_is_full_at_the_end_is_told_too(server: Server, tmp_path: Path) -> None:
    """What is still to be written then would be lost otherwise, and nobody the wiser."""
    program = write_program(tmp_path, "wait.py", WAIT)
    host = psutil.Process(server.process.pid)
    limit = host.rlimit(resource.RLIMIT_FSIZE)
    with server.client() as client:
        run = client.launch(program, record=tmp_path / "run.pie")
        assert any(isinstance(event, wire.Message) for event in run.events()), "it waits"
        host.rlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
        try:
            run.send(b"go on")
            result = run.result(DEADLINE)
        finally:
            host.rlimit(resource.RLIMIT_FSIZE, limit)
    assert result.reason is not None and result.reason.code == "recording"
    assert result.code != 0
