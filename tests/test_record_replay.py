"""`piehost launch --record` and `piehost replay`: the same run again, without a model."""

from __future__ import annotations

import itertools
import json
import re
import resource
import signal
import stat
import subprocess
import time
from pathlib import Path

import msgspec
import psutil
import pytest

from piehost.host.errors import HostError
from piehost.host.recording import Recorder, Recording, RunEvent
from piehost.wire import client as wire
from piehost.wire.recording import FromInferlet, ToInferlet, Written
from piehost.wire.stats import SeatStats

from . import record_harness
from .host_harness import (
    DEADLINE,
    WAIT,
    Server,
    Terminal,
    all_gone,
    compile_c,
    debugged,
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


# --- another program ----------------------------------------------------------------------------


def test_a_rewrite_in_c_replays_what_python_did(terminal: Terminal, tmp_path: Path) -> None:
    python = """
        from inferlet import Model, flush, inferlet, receive, send

        @inferlet
        def main(model: Model):
            send(b"tokens: ")
            count = len(model.tokenize(receive().result().decode()).result())
            send(f"{count}")
    """
    c = """
        #include <inferlet.h>
        #include <stdio.h>

        int main(void)
        {
            pie_future asked;
            pie_value line, tokens;
            char said[32];
            if (pie_init() || pie_send("tokens: ", 8, NULL) || pie_receive(&asked)
                || pie_wait(asked, &line)
                || pie_tokenize(0, (char *)line.bytes, line.length, true, &asked)
                || pie_wait(asked, &tokens)) {
                pie_perror("count");
                return 1;
            }
            pie_send(said, sprintf(said, "%zu", tokens.length), NULL);
            return 0;
        }
    """
    program = write_program(tmp_path, "count.py", python)
    said = record(terminal, tmp_path / "run.pie", program, stdin=b"one two three\n")
    assert said == b"tokens: 4\n"
    binding = ROOT / "bindings" / "c"
    source, binary = write_program(tmp_path, "count.c", c), tmp_path / "count"
    command: list[str | Path] = [
        "gcc",
        "-static",
        f"-I{binding}",
        "-o",
        binary,
        source,
        binding / "inferlet.c",
    ]
    subprocess.run(command, check=True, timeout=DEADLINE)
    assert replay(terminal, tmp_path / "run.pie", binary).stdout == said


NUMBERED = """
    import mmap

    first, at, apart = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    ring = mmap.mmap(4, startup["limits"]["ring_bytes"], prot=mmap.PROT_READ)
    queue, kv, embs, out = first, first + 1, first + 2, first + 3
    post(3, queue)
    post(8, queue, kv, 1)
    post(13, queue, embs, 2)
    if apart:  # waits where the other goes on
        ask(5, queue)
    else:
        waited = post(5, queue)
    post(13, queue, out, 1)
    post(16, queue, [embs, 0], [5, 6])
    post(17, queue, [embs, 0, 2], [], [kv, 0, 2], [out, 0, 1])
    written = ask(18, queue, [out, 0], 4, at)
    say(ring[at:at + 8 * written].hex())
"""


def test_handles_request_ids_and_places_are_the_programs_own(
    terminal: Terminal, tmp_path: Path
) -> None:
    program = write_raw(tmp_path, "numbered.py", NUMBERED)
    said = record(terminal, tmp_path / "run.pie", program, "1", "0")
    assert len(said) == 2 * 8 * 4 + 1
    assert replay(terminal, tmp_path / "run.pie", program, "70", "4096").stdout == said


def test_a_program_may_wait_where_the_recorded_one_went_on(
    terminal: Terminal, tmp_path: Path
) -> None:
    """Its answer was recorded after commands that it makes only once it has it."""
    program = write_raw(tmp_path, "numbered.py", NUMBERED)
    said = record(terminal, tmp_path / "run.pie", program, "1", "0")
    delayed = _with_answers_last(tmp_path / "run.pie", tmp_path / "delayed.pie")
    assert replay(terminal, delayed, program, "1", "0", "apart").stdout == said


def _with_answers_last(path: Path, changed: Path) -> Path:
    """The recording, as if no answer had come before the eighth command."""
    whole = Recording(str(path))
    held: list[ToInferlet] = []
    events: list[RunEvent] = []
    commands = 0
    for event in whole.events():
        if isinstance(event, ToInferlet) and commands < 8:
            held.append(event)
            continue
        events.append(event)
        if isinstance(event, FromInferlet):
            commands += len(msgspec.msgpack.decode(event.body))
            if commands == 8:
                events += held
    recorder = Recorder(str(changed))
    recorder.begin(whole.head, lambda reason: pytest.fail(reason.what))
    for event in events:
        recorder.add(event)
    recorder.close(wire.Ended(0, 0, None, SeatStats(), None))
    return changed


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


# --- ends that are not the program's own --------------------------------------------------------


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


# --- hostile inferlets in a recorded launch -----------------------------------------------------

SEND_HI = r'b"\x00\x09\x91\x93\x01\xc0\xc4\x03hi\n"'
HOSTILE = {
    "flags": (r'os.write(3, b"\x05abc"); time.sleep(600)', "bad_frame"),
    "size": (r'os.write(3, b"\x02" + b"\xff" * 8); time.sleep(600)', "bad_frame"),
    "commands": (r'os.write(3, b"\x00\x03abc"); time.sleep(600)', "bad_frame"),
    "depth": (
        r'os.write(3, b"\x02" + (60000).to_bytes(8, "big") + b"\x91" * 60000); time.sleep(600)',
        "bad_frame",
    ),
    "never reads": (
        r'while True: os.write(3, b"\x00\x04\x91\x92\x15\x01" * 1000)',
        "over_quota",
    ),
    "dies within a frame": (r'os.write(3, b"\x02\x00\x00"); os._exit(4)', ""),
    "octet by octet": (
        r'for octet in b"\x00\x08\x91\x93\x01\xc0\xc4\x02hi": os.write(3, bytes((octet,)))',
        "",
    ),
    "closes its end": ("os.close(3); time.sleep(0.1); os._exit(4)", ""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_inferlet_is_recorded_like_any_other(
    server: Server, tmp_path: Path, name: str
) -> None:
    line, reason = HOSTILE[name]
    source = f"import os\nimport time\n\nos.write(3, {SEND_HI})\n{line}\n"
    program = write_program(tmp_path, "hostile.py", source)
    with server.client() as client:
        result = client.launch(program, record=tmp_path / "run.pie").result(DEADLINE)
        assert (result.reason.code if result.reason else "") == reason
        assert client.stats().controller.seats == 0
    whole = Recording(str(tmp_path / "run.pie"))
    assert (whole.end.code, whole.end.reason) == (result.code, reason)
    done = replay(server.terminal, tmp_path / "run.pie", program, code=result.code)
    assert b"as recorded: " in done.stderr and done.stdout.startswith(b"hi\n")


def test_a_flood_is_held_up_and_others_are_served(server: Server, tmp_path: Path) -> None:
    source = """
        import os

        body = b"\\xdc\\x10\\x00" + b"\\x93\\x05\\xc0\\x01" * 4096
        while True:
            os.write(3, b"\\x02" + len(body).to_bytes(8, "big") + body)
    """
    path, program = tmp_path / "run.pie", write_program(tmp_path, "flood.py", source)
    honest = write_program(tmp_path, "count.py", COUNT)
    controller = server.child("controller")
    with server.client() as client:
        run = client.launch(program, record=path)
        assert eventually(lambda: path.exists() and path.stat().st_size > 1 << 20)
        with debugged(controller):
            assert eventually(lambda: _rests(path)), "nobody takes it, so it cannot go on"
        for _ in range(3):
            assert client.launch(honest).result(DEADLINE).code == 0
        run.cancel()
        result = run.result(DEADLINE)
    assert result.reason is not None and result.reason.code == "cancelled"
    assert Recording(str(path)).end.reason == "cancelled"


def _rests(path: Path) -> bool:
    """It does not grow for a while."""
    size = path.stat().st_size
    time.sleep(0.5)
    return path.stat().st_size == size


def test_the_last_words_of_a_recorded_inferlet_count(server: Server, tmp_path: Path) -> None:
    """More than a socket holds, and then it is gone."""
    source = """
        import os

        body = b"\\x91\\x93\\x01\\xc0\\xc5\\x4e\\x20" + b"x" * 20000
        for _ in range(40):
            frame = b"\\x02" + len(body).to_bytes(8, "big") + body
            while frame:
                frame = frame[os.write(3, frame):]
        os._exit(0)
    """
    program = write_program(tmp_path, "last.py", source)
    with server.client() as client:
        result = client.launch(program, record=tmp_path / "run.pie").result(DEADLINE)
    assert result.code == 0
    assert len(result.messages) == 40
    assert Recording(str(tmp_path / "run.pie")).commands == 40


# --- the file -----------------------------------------------------------------------------------


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
