"""A recording replays to another program that does the same: in another language, with handles,
request ids and places of its own, waiting where the recorded one went on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec
import pytest

from piehost.host.recording import Recorder, Recording, RunEvent
from piehost.wire import client as wire
from piehost.wire.recording import FromInferlet, ToInferlet
from piehost.wire.stats import SeatStats

from . import record_harness
from .c_driver import ROOT
from .host_harness import DEADLINE, Terminal, write_program
from .raw_inferlet import write_raw
from .record_harness import record, replay

terminal = record_harness.terminal  # the fixture


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
