"""Recorded runs that others ended: stopped, interrupted, without their controller, crashed."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

from piehost.host.recording import Recording
from piehost.wire import client as wire

from . import record_harness
from .host_harness import DEADLINE, Server, Terminal, compile_c, new_terminal, write_program
from .record_harness import COUNT, replay

terminal = record_harness.terminal  # the fixture


def test_an_inferlet_that_was_stopped_ends_there_again(
    terminal: Terminal, server: Server, tmp_path: Path
) -> None:
    program = write_program(tmp_path, "count.py", COUNT)
    process = terminal.start(
        "launch", "--record", tmp_path / "run.pie", program, "--", "--nap", "600"
    )
    assert process.stdout is not None
    assert process.stdout.read(3)
    with server.client() as client:
        client.stop(None)
    process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + signal.SIGKILL
    done = replay(terminal, tmp_path / "run.pie", program, code=128 + signal.SIGKILL)
    assert b"the recorded run was ended here: stopped" in done.stderr
    assert b"as recorded: " in done.stderr


def test_an_interrupted_launch_leaves_a_whole_recording(tmp_path: Path) -> None:
    program = write_program(tmp_path, "count.py", COUNT)
    arguments = ("--model", "scripted", "--record", tmp_path / "run.pie", program)
    with new_terminal() as own:
        process = own.start("launch", *arguments, "--", "--nap", "600")
        assert process.stdout is not None
        assert process.stdout.read(6).count(b";") == 3
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=DEADLINE)
        assert process.returncode == 128 + signal.SIGINT
        whole = Recording(str(tmp_path / "run.pie"))
        assert whole.end.reason and whole.commands == 6


def test_a_lost_controller_is_the_end_of_the_recording(tmp_path: Path) -> None:
    program, path = write_program(tmp_path, "count.py", COUNT), tmp_path / "run.pie"
    with new_terminal() as own, own.server("--model", "scripted") as server:
        with server.client() as client:
            run = client.launch(program, ["--nap", "600"], record=path)
            messages = (event for event in run.events() if isinstance(event, wire.Message))
            assert len(list(itertools.islice(messages, 3))) == 3
            server.kill("controller")
            result = run.result(DEADLINE)
        assert result.reason is not None and result.reason.code == "controller_lost"
        done = replay(own, path, program, code=125)
    assert b"the recorded run was ended here: controller_lost" in done.stderr


def test_a_crash_is_the_same_crash(terminal: Terminal, tmp_path: Path) -> None:
    program = compile_c(tmp_path, "crash", "int main(void) { *(volatile int *)8 = 1; return 0; }")
    code = 128 + signal.SIGSEGV
    terminal.run("launch", "--record", tmp_path / "run.pie", program, check=code)
    assert b"killed by SIGSEGV" in replay(terminal, tmp_path / "run.pie", program, code=code).stderr
