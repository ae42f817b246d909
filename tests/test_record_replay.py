"""`piehost launch --record` and `piehost replay`: the same run again without a model, or the first
thing in which it is another."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest

from piehost.host.recording import Recording

from . import record_harness
from .host_harness import (
    DEADLINE,
    Terminal,
    all_gone,
    eventually,
    family,
    new_terminal,
    write_program,
)
from .raw_inferlet import write_raw
from .record_harness import COUNT, record, replay

terminal = record_harness.terminal  # the fixture
ROOT = Path(__file__).resolve().parent.parent
INFERLETS = ROOT / "inferlets"
PROMPT = ("--prompt", "The capital of France is", "--max-tokens", "12")
PROBABILITIES = """
    from inferlet import Model, inferlet

    @inferlet
    def main(model: Model, prompt: str = "The capital of France is"):
        tokens = model.tokenize(prompt).result()
        with model.queue() as q:
            kv = q.alloc_kv(len(tokens) + 3)
            out = q.forward(q.embed_txt(tokens), write=kv[: len(tokens)])
            for at in range(len(tokens), len(kv)):
                seen = q.get_next_dist(out[-1], 5).result()
                yield f"{seen.ids.tolist()} {seen.probs.tolist()} "
                step = q.embed_txt([seen.argmax()], [at])
                out = q.forward(step, read=kv[:at], write=kv[at : at + 1])
"""
MASKED = """
    import mmap

    at, allowed = map(int, sys.argv[1:])
    ring = mmap.mmap(5, startup["limits"]["ring_in_bytes"])
    size = -(-startup["models"][0]["vocab_size"] // 8)
    ring[at : at + size] = bytes(size)
    ring[at + allowed // 8] = 1 << allowed % 8
    post(3, 1)
    post(8, 1, 1, 1)
    post(13, 1, 1, 2)
    post(16, 1, [1, 0], [5])
    post(17, 1, [1, 0, 1], [], [1, 0, 1], [1, 1, 1])
    say(ask(19, 1, [1, 1], 1, 0.0, 0, 1.0, 0.0, None, [], False, at))
"""


# --- the same again -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text_completion", "explicit_decode", "context_completion"])
def test_an_inferlet_says_the_same_again(terminal: Terminal, tmp_path: Path, name: str) -> None:
    said = record(terminal, tmp_path / "run.pie", INFERLETS / name, *PROMPT)
    assert b"Paris" in said
    done = replay(terminal, tmp_path / "run.pie", INFERLETS / name)
    assert done.stdout == said
    assert b"piehost: as recorded: " in done.stderr and b"exit code 0" in done.stderr


@pytest.mark.parametrize("name", ["text_completion", "explicit_decode"])
def test_an_inferlet_in_c_says_the_same_again(
    terminal: Terminal, tmp_path: Path, name: str
) -> None:
    subprocess.run(["make", "-s", "-C", INFERLETS / "c"], check=True, timeout=DEADLINE)
    said = record(terminal, tmp_path / "run.pie", INFERLETS / "c" / name, *PROMPT)
    assert b"Paris" in said
    assert replay(terminal, tmp_path / "run.pie", INFERLETS / "c" / name).stdout == said


def test_a_host_of_its_own_records_too(tmp_path: Path) -> None:
    program = write_program(tmp_path, "count.py", COUNT)
    arguments = ("--model", "scripted", "--record", tmp_path / "run.pie", program)
    with new_terminal() as own:
        said = own.run("launch", *arguments, check=0)
        assert replay(own, tmp_path / "run.pie", program).stdout == said.stdout


def test_probabilities_are_in_the_ring_again(terminal: Terminal, tmp_path: Path) -> None:
    program = write_program(tmp_path, "probabilities.py", PROBABILITIES)
    said = record(terminal, tmp_path / "run.pie", program)
    assert said.count(b"[") == 6
    assert replay(terminal, tmp_path / "run.pie", program).stdout == said


def test_what_the_client_sent_is_received_again(terminal: Terminal, tmp_path: Path) -> None:
    source = """
        from inferlet import ClosedError, flush, receive, send

        try:
            while True:
                send(receive().result().upper() + b";")
        except ClosedError:
            send("closed")
            flush()
    """
    program = write_program(tmp_path, "echo.py", source)
    said = record(terminal, tmp_path / "run.pie", program, stdin=b"one\ntwo\n")
    assert said == b"ONE;TWO;closed\n"
    assert replay(terminal, tmp_path / "run.pie", program).stdout == said


def test_masks_are_compared_by_what_lies_in_the_ring(terminal: Terminal, tmp_path: Path) -> None:
    program = write_raw(tmp_path, "masked.py", MASKED)
    said = record(terminal, tmp_path / "run.pie", program, "0", "100")
    assert said == b"100\n"
    assert replay(terminal, tmp_path / "run.pie", program, "4096", "100").stdout == said
    done = replay(terminal, tmp_path / "run.pie", program, "0", "101", code=1)
    assert b"the octets in ring in at mask: octet 12: recorded" in done.stderr


def test_there_is_no_model_no_controller_and_ctrl_c_works(
    terminal: Terminal, tmp_path: Path
) -> None:
    program = write_program(tmp_path, "count.py", COUNT)
    said = record(terminal, tmp_path / "run.pie", program)
    process = terminal.start("replay", tmp_path / "run.pie", program, "--", "--nap", "600")
    assert process.stdout is not None
    assert process.stdout.read(len(said) - 1) == said.rstrip()
    processes = family(process.pid)
    commands = [" ".join(p.cmdline()) for p in processes]
    started = [c for c in commands[1:] if "sandbox.launcher" not in c]
    assert len(commands) == 4 and not started, commands  # the inferlet is a fork of the zygote
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + signal.SIGINT
    assert err == b"piehost: interrupted after 6 of 6 commands\n"
    assert eventually(lambda: all_gone(processes))


def test_json_is_one_object(terminal: Terminal, tmp_path: Path) -> None:
    program = write_program(tmp_path, "count.py", COUNT)
    record(terminal, tmp_path / "run.pie", program, "--count", "2")
    done = terminal.run("replay", "--json", tmp_path / "run.pie", program, check=0)
    same = json.loads(done.stdout)
    assert same["identical"] and same["commands"] == same["recorded_commands"] == 4
    assert same["messages"] == ["3;", "4;"]
    done = terminal.run(
        "replay", "--json", tmp_path / "run.pie", program, "--", "--count", "1", check=1
    )
    other = json.loads(done.stdout)
    assert not other["identical"] and other["code"] == 1
    assert other["difference"]["command"] == 3
    assert (other["args"], other["recorded_args"]) == (["--count", "1"], ["--count", "2"])


def test_the_time_left_is_the_recorded_time(terminal: Terminal, tmp_path: Path) -> None:
    source = """
        from inferlet import flush, send
        from inferlet.runtime import deadline, time_left

        send(f"{deadline() is not None} {50 < time_left() <= 60}")
        flush()
    """
    (tmp_path / "inferlet.toml").write_text('entry = "main.py"\n[quota]\nwall_seconds = 60\n')
    write_program(tmp_path, "main.py", source)
    assert record(terminal, tmp_path / "run.pie", tmp_path) == b"True True\n"
    whole = Recording(str(tmp_path / "run.pie"))
    assert whole.head.startup.deadline is not None
    assert whole.head.startup.deadline - whole.head.began == pytest.approx(60, abs=5)
    assert replay(terminal, tmp_path / "run.pie", tmp_path).stdout == b"True True\n"


def test_the_page_shows_what_happens(terminal: Terminal, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "record-replay.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (shown,) = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    (tmp_path / "greet.py").write_text(program)
    happened = ""
    for line in [line for line in shown.splitlines() if line.startswith("$ ")]:
        script = (
            f"cd {tmp_path}; {{ {line[2:].replace('piehost', chr(34) + '$@' + chr(34))}; }} 2>&1"
        )
        happened += f"{line}\n{terminal.shell(script).stdout.decode()}"
    numbers = re.compile(r"\d+")  # what a generation takes in calls is the SDK's business
    assert numbers.sub("N", happened) == numbers.sub("N", shown)


# --- differences --------------------------------------------------------------------------------


def test_another_prompt_is_named(terminal: Terminal, tmp_path: Path) -> None:
    record(terminal, tmp_path / "run.pie", INFERLETS / "text_completion", *PROMPT)
    other = ("--prompt", "The capital of Spain is")
    done = replay(terminal, tmp_path / "run.pie", INFERLETS / "text_completion", *other, code=1)
    assert b"is another\n  recorded: tokenize(" in done.stderr
    assert (
        b"  text: character 15: recorded 'The capital of France is', came 'The capital of Spain"
        in done.stderr
    )
    assert b"the arguments are others: recorded --prompt 'The capital of France" in done.stderr
    assert done.stdout == b""


def test_another_parameter_is_named(terminal: Terminal, tmp_path: Path) -> None:
    record(terminal, tmp_path / "run.pie", INFERLETS / "text_completion", *PROMPT)
    warm = (*PROMPT, "--temperature", "0.5")
    done = replay(terminal, tmp_path / "run.pie", INFERLETS / "text_completion", *warm, code=1)
    assert b"  temperature: recorded 0.0, came 0.5\n" in done.stderr


def test_a_call_more_is_named(terminal: Terminal, tmp_path: Path) -> None:
    program = write_program(tmp_path, "count.py", COUNT)
    record(terminal, tmp_path / "run.pie", program)
    done = replay(terminal, tmp_path / "run.pie", program, "--count", "4", code=1)
    assert b"the recording ends with command 6, the program goes on" in done.stderr
    assert b"came:     tokenize(model=0, text='one one one one ')" in done.stderr


def test_a_call_in_between_is_named(terminal: Terminal, tmp_path: Path) -> None:
    program = write_program(tmp_path, "count.py", COUNT)
    record(terminal, tmp_path / "run.pie", program)
    changed = write_program(
        tmp_path, "changed.py", COUNT.replace("send(f", "model.tokenize('x'); send(f")
    )
    done = replay(terminal, tmp_path / "run.pie", changed, code=1)
    assert b"not as in" in done.stderr and b"text='x')" in done.stderr


def test_an_early_end_is_named(terminal: Terminal, tmp_path: Path) -> None:
    program = write_program(tmp_path, "count.py", COUNT)
    record(terminal, tmp_path / "run.pie", program)
    args = ("--count", "2", "--code", "7")
    done = replay(terminal, tmp_path / "run.pie", program, *args, code=1)
    assert b"the program ended after 4 of 6 commands" in done.stderr
    assert b"recorded: tokenize(" in done.stderr
    assert b"came:     exit code 7" in done.stderr


def test_another_exit_code_is_named(terminal: Terminal, tmp_path: Path) -> None:
    program = write_program(tmp_path, "count.py", COUNT)
    record(terminal, tmp_path / "run.pie", program)
    done = replay(terminal, tmp_path / "run.pie", program, "--code", "9", code=1)
    assert b"the exit code is another\n  recorded: 0\n  came:     9\n" in done.stderr


def test_the_use_of_time_is_named(terminal: Terminal, tmp_path: Path) -> None:
    program = write_program(tmp_path, "count.py", COUNT)
    record(terminal, tmp_path / "run.pie", program, "--clock")
    done = replay(terminal, tmp_path / "run.pie", program, code=1)
    assert b"command 7 of 7 is another" in done.stderr
    assert b"data: octet " in done.stderr


def test_a_handle_of_something_else_is_named(terminal: Terminal, tmp_path: Path) -> None:
    source = """
        post(3, 1)
        post(8, 1, 10, 1)
        post(8, 1, 11, 1)
        ask(9, 1, int(sys.argv[1]))
    """
    program = write_raw(tmp_path, "free.py", source)
    record(terminal, tmp_path / "run.pie", program, "10")
    done = replay(terminal, tmp_path / "run.pie", program, "11", code=1)
    assert b"kv: recorded made by command 2, came made by command 3" in done.stderr
    done = replay(terminal, tmp_path / "run.pie", program, "12", code=1)
    assert b"came never made" in done.stderr
