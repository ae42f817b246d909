"""Short runs of the fuzz targets (`fuzz/`): what both sides read from each other is hostile.

`make fuzz` runs the same for as long as one likes, led by what code was reached.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fuzz import seeds
from fuzz.frames import one_input

FUZZ = Path(__file__).parents[1] / "fuzz"
EXAMPLES = int(os.environ.get("PIEHOST_FUZZ_EXAMPLES", "300"))
FRAMES = [frame[1:] for frame in seeds.frames()]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A few golden frames, and octets of them changed, left out or put in."""
    octets = bytearray(b"".join(draw(st.lists(st.sampled_from(FRAMES), min_size=1, max_size=4))))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(octets)))
        octets[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    return bytes(octets)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 300)
@given(portion=st.integers(0, 255), octets=damaged() | st.binary(max_size=400))
@example(portion=255, octets=b"\2" + (65537).to_bytes(8, "big") + bytes(60000))
@example(portion=255, octets=b"\3" + (1).to_bytes(8, "big") + b"\x90")
@example(portion=1, octets=b"\0\1\x90" * 60)
@example(portion=9, octets=b"\2" + (65536).to_bytes(8, "big") + bytes(60000))
def test_what_an_inferlet_writes_is_commands_or_ends_it(portion: int, octets: bytes) -> None:
    one_input(bytes([portion]) + octets)


def test_the_golden_frames_are_read_as_fuzzers_read_them() -> None:
    for frame in seeds.frames():
        one_input(frame)


def fuzz(*command: str | Path) -> str:
    """What a fuzzer says. It fails if it has found something."""
    done = subprocess.run([*map(str, command)], cwd=FUZZ.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="no atheris (pip install atheris)"
)
def test_frames_under_atheris(tmp_path: Path) -> None:
    seeds.write("frames", tmp_path)
    said = fuzz(sys.executable, FUZZ / "frames.py", "-runs=2000", "-seed=1", tmp_path)
    assert "Done 2000 runs" in said


@pytest.mark.skipif(shutil.which("clang") is None, reason="no clang, which libFuzzer comes with")
def test_the_c_decoder_under_libfuzzer(tmp_path: Path) -> None:
    program, corpus = FUZZ / "build" / "c_decoder", tmp_path / "corpus"
    subprocess.run(["make", "--quiet", "-C", FUZZ, "build/c_decoder"], check=True)
    seeds.write("c_decoder", corpus)
    found = f"-artifact_prefix={tmp_path}/"
    assert "Done 20000 runs" in fuzz(program, "-runs=20000", "-seed=1", found, corpus)
