"""Hostile inferlets in a recorded launch: they end as without it, and hold up nobody else."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from piehost.host.recording import Recording

from .host_harness import DEADLINE, Server, debugged, eventually, write_program
from .record_harness import COUNT, replay

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
