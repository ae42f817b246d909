"""`piehost launch`: a program runs as if it had been started here."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from pathlib import Path

import pytest

from .host_harness import DEADLINE, PIEHOST, WAIT, Server, compile_c, eventually, write_program

GENERATE = """
    from inferlet import Model, inferlet

    @inferlet
    def complete(model: Model, prompt: str, max_tokens: int = 8):
        with model.context(prompt) as context:
            yield from context.generate(max_tokens)
"""
ECHO = """
    from inferlet import ClosedError, flush, receive, send

    try:
        while True:
            send(receive().result().upper() + b";")
    except ClosedError:
        send("closed")
        flush()
"""


def test_python_script_generates_from_the_model(server: Server, tmp_path: Path) -> None:
    path = write_program(tmp_path, "complete.py", GENERATE)
    done = server.terminal.run(
        "launch", path, "--", "--prompt", "The capital of France is", check=0
    )
    assert done.stdout.decode().startswith(" Paris")
    assert done.stdout.endswith(b"\n") and not done.stdout.endswith(b"\n\n")
    assert done.stderr == b""


def test_stdout_stderr_and_exit_code_are_the_scripts_own(server: Server, tmp_path: Path) -> None:
    source = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)"
    done = server.terminal.run("launch", write_program(tmp_path, "exits.py", source), check=7)
    assert done.stdout == b"out\n"
    assert done.stderr == b"err\n"


def test_executable_runs_with_its_arguments(server: Server, tmp_path: Path) -> None:
    source = """
        #include <stdio.h>
        int main(int argc, char **argv) {
            for (int i = 1; i < argc; i++) printf("[%s]", argv[i]);
            return argc + 40;
        }
    """
    path = compile_c(tmp_path, "arguments", source)
    done = server.terminal.run("launch", path, "--", "-x", "two words", check=43)
    assert done.stdout == b"[-x][two words]\n"  # with the newline that it left out


def test_arguments_arrive_by_get_arg(server: Server, tmp_path: Path) -> None:
    source = "from inferlet import args, get_arg\nprint(get_arg(1), len(args()))"
    path = write_program(tmp_path, "arguments.py", source)
    done = server.terminal.run("launch", path, "--", "a", "--stats", "ü", check=0)
    assert done.stdout == b"--stats 3\n"


def test_folder_with_a_manifest(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "agent"
    folder.mkdir()
    (folder / "inferlet.toml").write_text(
        'name = "my-agent"\ndescription = "d"\nentry = "main.py"\n[quota]\nkv_pages = 5\n'
    )
    (folder / "data.txt").write_text("from its folder")
    (folder / "part.py").write_text("WORD = 'imported'")
    source = """
        import part
        from inferlet.runtime import runtime

        print(runtime.startup.limits.kv_pages, part.WORD, open("data.txt").read())
    """
    write_program(folder, "main.py", source)
    done = server.terminal.run("launch", folder, "--json", check=0)
    summary = json.loads(done.stdout)
    assert summary["stdout"] == "5 imported from its folder\n"
    assert summary["id"].startswith("my-agent-")


def test_launch_quota_overrides_the_manifest(server: Server, tmp_path: Path) -> None:
    (tmp_path / "inferlet.toml").write_text(
        'entry = "main.py"\n[quota]\nkv_pages = 5\nembeds = 6\n'
    )
    source = """
        from inferlet.runtime import runtime

        limits = runtime.startup.limits
        print(limits.kv_pages, limits.embeds, limits.tokens)
    """
    write_program(tmp_path, "main.py", source)
    done = server.terminal.run("launch", tmp_path, "--quota", "kv_pages=9", check=0)
    assert done.stdout == b"9 6 4096\n"


def test_memory_quota_is_a_hard_limit(server: Server, tmp_path: Path) -> None:
    source = """
        try:
            bytearray(1 << 30)
            print("allocated")
        except MemoryError:
            print("refused")
    """
    path = write_program(tmp_path, "greedy.py", source)
    assert server.terminal.run("launch", path, check=0).stdout == b"allocated\n"
    done = server.terminal.run("launch", path, "--quota", "address_space=1GiB", check=0)
    assert done.stdout == b"refused\n"


def test_large_ring_comes_from_the_quota(server: Server, tmp_path: Path) -> None:
    source = """
        import os

        from inferlet.runtime import runtime

        print(runtime.startup.limits.ring_bytes, os.fstat(4).st_size)
    """
    path = write_program(tmp_path, "ring.py", source)
    done = server.terminal.run("launch", path, "--quota", "ring_bytes=3MiB", check=0)
    assert done.stdout == b"3145728 3145728\n"
    done = server.terminal.run("launch", path, check=0)
    assert done.stdout == b"1048576 1048576\n"


def test_lines_of_stdin_arrive_by_receive(server: Server, tmp_path: Path) -> None:
    path = write_program(tmp_path, "echo.py", ECHO)
    done = server.terminal.run("launch", path, stdin=b"one\n\ntwo words\nlast", check=0)
    assert done.stdout == b"ONE;;TWO WORDS;LAST;closed\n"


def test_line_longer_than_a_message_is_refused(server: Server, tmp_path: Path) -> None:
    path = write_program(tmp_path, "echo.py", ECHO)
    done = server.terminal.run("launch", path, stdin=b"x" * 70000 + b"\n", check=125)
    assert b"too long" in done.stderr and b"try:" in done.stderr


def test_stdin_on_a_terminal_is_interactive(server: Server, tmp_path: Path) -> None:
    path = write_program(tmp_path, "echo.py", ECHO)
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(PIEHOST[0], [*PIEHOST, "launch", str(path)], server.terminal.environment)
    shown = b""
    os.write(terminal, b"hello\n")
    while b"HELLO;" not in shown:
        shown += os.read(terminal, 4096)
    os.write(terminal, b"\x04")  # Ctrl-D
    while b"closed\r\n" not in shown:
        shown += os.read(terminal, 4096)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)


def test_messages_are_written_as_they_come(server: Server, tmp_path: Path) -> None:
    source = """
        from inferlet import receive, flush, send

        send("first ")
        send(receive().result() + b"\\n")
        flush()
    """
    process = server.terminal.start("launch", write_program(tmp_path, "talk.py", source))
    assert process.stdout is not None
    assert process.stdout.read(6) == b"first "  # it is waiting for us now
    out, _ = process.communicate(b"second\n", DEADLINE)
    assert out == b"second\n"
    assert process.returncode == 0


def test_json_is_one_object_with_everything(server: Server, tmp_path: Path) -> None:
    path = write_program(tmp_path, "complete.py", GENERATE)
    arguments = ("--", "--prompt", "The capital of France is", "--max-tokens", "4")
    summary = json.loads(server.terminal.run("launch", "--json", path, *arguments, check=0).stdout)
    assert summary["code"] == 0 and summary["reason"] is None
    assert "".join(summary["messages"]).startswith(" Paris")
    assert summary["stats"]["tokens_out"] >= 1
    assert summary["stats"]["steps"] >= summary["stats"]["tokens_out"]
    assert summary["usage"]["max_rss_bytes"] > 1 << 20


def test_stats_go_to_stderr(server: Server, tmp_path: Path) -> None:
    path = write_program(tmp_path, "complete.py", GENERATE)
    done = server.terminal.run("launch", "--stats", path, "--", "--prompt", "Hello", check=0)
    names = [line.split("  ")[0] for line in done.stderr.decode().splitlines()]
    assert names == ["steps", "tokens", "bytes", "messages", "messages per token", "process"]
    assert b"steps" not in done.stdout


def test_crash_is_128_plus_the_signal_with_a_reason(server: Server, tmp_path: Path) -> None:
    path = compile_c(tmp_path, "crash", "int main(void) { *(volatile int *)8 = 1; return 0; }")
    done = server.terminal.run("launch", path, check=128 + signal.SIGSEGV)
    assert b"killed by SIGSEGV" in done.stderr


def test_forbidden_call_is_reported_by_name(server: Server, tmp_path: Path) -> None:
    source = """
        #include <sys/ptrace.h>
        int main(void) { ptrace(PTRACE_TRACEME, 0, 0, 0); return 0; }
    """
    path = compile_c(tmp_path, "tracer", source)
    done = server.terminal.run("launch", path, check=128 + signal.SIGSYS)
    assert b"killed by the sandbox: ptrace" in done.stderr


def test_cpu_quota_ends_a_spinning_program(server: Server, tmp_path: Path) -> None:
    path = compile_c(tmp_path, "spin", "int main(void) { for (volatile int i = 0;; i++); }")
    done = server.terminal.run("launch", path, "--quota", "cpu_seconds=1")
    assert done.returncode in (128 + signal.SIGXCPU, 128 + signal.SIGKILL)
    assert b"processor time" in done.stderr


def test_stdout_flood_is_cut_off_and_the_program_goes_on(server: Server, tmp_path: Path) -> None:
    source = """
        import sys

        for _ in range(20):
            sys.stdout.write("x" * 50000)
        sys.stdout.flush()
        sys.exit(5)
    """
    path = write_program(tmp_path, "flood.py", source)
    done = server.terminal.run("launch", path, "--quota", "output_bytes=100000", check=5)
    assert done.stdout.count(b"x") == 100000
    assert b"stdout is cut off after 100000 octets" in done.stdout


def test_bad_frame_is_a_typed_end(server: Server, tmp_path: Path) -> None:
    source = "import os, time; os.write(3, b'\\x00\\x03abc'); time.sleep(60)"
    path = write_program(tmp_path, "garbage.py", source)
    done = server.terminal.run("launch", path, check=128 + signal.SIGKILL)
    assert b"bad_frame" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_stops_the_inferlet(server: Server, tmp_path: Path, number: int) -> None:
    process = server.terminal.start_ready("launch", write_program(tmp_path, "wait.py", WAIT))
    process.send_signal(number)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + number
    assert b"Traceback" not in err
    with server.client() as client:
        assert eventually(lambda: not client.inferlets())


def test_closed_pipe_stops_the_inferlet_quietly(server: Server, tmp_path: Path) -> None:
    source = """
        from inferlet import flush, send

        while True:
            send("line\\n")
            flush()
    """
    path = write_program(tmp_path, "endless.py", source)
    command = subprocess.list2cmdline([*PIEHOST, "launch", str(path)])
    done = subprocess.run(
        ["bash", "-c", f"{command} </dev/null | head -n 1; exit ${{PIPESTATUS[0]}}"],
        env=server.terminal.environment,
        capture_output=True,
        timeout=DEADLINE,
    )
    assert done.stdout == b"line\n"
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == b""
    with server.client() as client:
        assert eventually(lambda: not client.inferlets())
