"""The machine code that works off a child's system calls."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
from pathlib import Path

import pytest

from piehost.host.sandbox import calls
from piehost.host.sandbox.calls import STATUS_FD, Calls


def test_the_code_is_its_source(tmp_path: Path) -> None:
    source, compiled, binary = (tmp_path / f"code.{end}" for end in ("s", "o", "bin"))
    source.write_text(f".intel_syntax noprefix\n.text\n{calls.SOURCE}")
    subprocess.run(["gcc", "-c", source, "-o", compiled], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", compiled, binary], check=True)
    assert binary.read_bytes() == calls.CODE


def in_child(table: Calls) -> tuple[int, bytes]:
    """(exit code, report) of a forked child that works off `table`; 0 if it got to the end."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(writer, STATUS_FD)
        table.run()
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    report = os.read(reader, 64)
    os.close(reader)
    return os.waitstatus_to_exitcode(status), report


def test_works_off_every_call_and_stores_results() -> None:
    shared = mmap.mmap(-1, mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(shared))
    reader, writer = os.pipe()
    table = Calls()
    for letter in (b"p", b"i", b"e"):
        table.add("write", "write", writer, table.pointer(letter), 1, equals=1)
    table.add("pid", "getpid", store=address)
    table.seal()
    assert in_child(table) == (0, b"")
    assert os.read(reader, 10) == b"pie"
    assert int.from_bytes(shared[:4], "little") not in (0, os.getpid())
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(
    ("stage", "failing", "code"),
    [
        ("bad fd", lambda t: t.add("bad fd", "close", 1000), errno.EBADF),
        ("no path", lambda t: t.add("no path", "chdir", t.pointer(b"/nowhere\0")), errno.ENOENT),
        ("parent", lambda t: t.add("parent", "getppid", equals=1), 0),
    ],
)
def test_stops_at_the_first_failure_and_names_it(stage, failing, code) -> None:  # type: ignore[no-untyped-def]
    reader, writer = os.pipe()
    table = Calls()
    table.add("before", "getpid")
    failing(table)
    table.add("after", "write", writer, table.pointer(b"x"), 1)
    table.seal()
    exit_code, report = in_child(table)
    assert exit_code == 127 and table.failure(report) == (stage, code)
    os.close(writer)
    assert os.read(reader, 1) == b"", "it went on after a failure"
    os.close(reader)
