"""What cannot be launched says what, why and what to try, with an exit code of its own kind."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import pytest

from .host_harness import Server, Terminal, compile_c, write_program

HELLO = "int main(void) { return 0; }"


def refused(server: Server, code: int, *arguments: object) -> str:
    """The error of a launch that must fail with `code`."""
    done = server.terminal.run("launch", *arguments, check=code)
    error = done.stderr.decode()
    assert error.startswith("piehost: "), error
    assert "Traceback" not in error
    assert done.stdout == b""
    return error


def test_missing_program(server: Server, tmp_path: Path) -> None:
    error = refused(server, 127, tmp_path / "nothing.py")
    assert "no program" in error and "try:" in error


def test_script_with_a_syntax_error(server: Server, tmp_path: Path) -> None:
    error = refused(server, 126, write_program(tmp_path, "broken.py", "x = 1\ndef f(:\n"))
    assert "broken.py, line 2" in error and "invalid syntax" in error


def test_script_that_is_not_text(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "binary.py"
    path.write_bytes(b"\x00\xff\xfe")
    assert "does not parse" in refused(server, 126, path)


def test_executable_without_the_x_bit(server: Server, tmp_path: Path) -> None:
    path = compile_c(tmp_path, "hello", HELLO)
    path.chmod(0o644)
    error = refused(server, 126, path)
    assert "no execute permission" in error and f"chmod +x {path}" in error


def test_executable_of_another_architecture(server: Server, tmp_path: Path) -> None:
    path = compile_c(tmp_path, "hello", HELLO)
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, 18, 183)  # e_machine
    path.write_bytes(data)
    error = refused(server, 126, path)
    assert "is built for" in error and "aarch64" in error


def test_file_that_is_no_program(server: Server, tmp_path: Path) -> None:
    path = write_program(tmp_path, "script", "#!/bin/sh\necho hello\n")
    path.chmod(0o755)
    assert "a script with #!" in refused(server, 126, path)


def test_folder_without_a_manifest(server: Server, tmp_path: Path) -> None:
    assert "without inferlet.toml" in refused(server, 126, tmp_path)


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        ("entry = ", "Invalid value"),
        ('name = "x"', "entry"),
        ('entry = "main.py"\nextra = 1', "extra"),
        ('entry = "main.py"\nkind = "wasm"', "wasm"),
        ('entry = "../outside.py"', "outside"),
        ('entry = "/etc/passwd"', "outside"),
        ('entry = "link.py"', "outside"),
        ('entry = "loop"', "cannot be followed"),
        ('entry = "a\\u0000b"', "cannot be followed"),
        ('entry = "main.py"\n[quota]\nkv_pagez = 1', "kv_pagez"),
        ('entry = "main.py"\n[quota]\nkv_pages = "many"', "many"),
    ],
)
def test_wrong_manifest(server: Server, tmp_path: Path, manifest: str, says: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_program(folder, "main.py", "print('ran')")
    outside = write_program(tmp_path, "outside.py", "print('ran')")
    (folder / "link.py").symlink_to(outside)
    (folder / "loop").symlink_to("loop")
    (folder / "inferlet.toml").write_text(manifest)
    assert says in refused(server, 126, folder)


def test_manifest_that_is_a_pipe(server: Server, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "inferlet.toml")
    assert "no regular file" in refused(server, 126, tmp_path)


def test_text_that_is_not_utf8(server: Server, tmp_path: Path) -> None:
    path = write_program(tmp_path, "hello.py", "print('ran')")
    assert "not UTF-8" in refused(server, 126, path, "--", os.fsdecode(b"\xff"))
    odd = write_program(tmp_path, os.fsdecode(b"odd\xff.py"), "print('ran')")
    assert "not UTF-8" in refused(server, 126, odd)


def test_manifest_whose_entry_is_not_there(server: Server, tmp_path: Path) -> None:
    (tmp_path / "inferlet.toml").write_text('entry = "build/agent"')
    assert "build/agent" in refused(server, 127, tmp_path)


@pytest.mark.parametrize(
    "quota", ["kv_pagez=1", "kv_pages", "kv_pages=-1", "kv_pages=0", "memory=1XB", "fds=1e3"]
)
def test_wrong_quota(server: Server, tmp_path: Path, quota: str) -> None:
    path = write_program(tmp_path, "hello.py", "print('ran')")
    error = refused(server, 2, path, "--quota", quota)
    assert quota.partition("=")[0] in error


def test_model_that_does_not_exist(terminal: Terminal, tmp_path: Path) -> None:
    path = write_program(tmp_path, "hello.py", "print('ran')")
    done = terminal.run("launch", "--model", tmp_path / "no-model", path, check=125)
    assert b"cannot load the model" in done.stderr and b"try:" in done.stderr
    assert b"Traceback" not in done.stderr and done.stdout == b""
    assert list(terminal.run_dir.iterdir()) == []


def test_socket_where_no_server_listens(terminal: Terminal, tmp_path: Path) -> None:
    path = write_program(tmp_path, "hello.py", "print('ran')")
    done = terminal.run("launch", "--socket", tmp_path / "none.sock", path, check=125)
    assert b"no server listens" in done.stderr


def test_run_directory_that_others_can_write(terminal: Terminal, tmp_path: Path) -> None:
    path = write_program(tmp_path, "hello.py", "print('ran')")
    terminal.run_dir.mkdir()
    terminal.run_dir.chmod(0o777)
    done = terminal.run("launch", path, check=125)
    assert b"not safe" in done.stderr and b"0700" in done.stderr


def test_wrong_usage_is_exit_code_2(terminal: Terminal) -> None:
    assert b"9" in terminal.run("serve", "--page-size", 9, check=2).stderr
    assert b"No such option" in terminal.run("launch", "--nonsense", "x.py", check=2).stderr
    theirs = terminal.run("launch", "x.py", "--prompt", "Hi", check=2)
    assert b"-- --prompt" in theirs.stderr, "where the program's options go"
    both = terminal.run("launch", "--kv-pages", 9, "--kv-memory", 0.5, "x.py", check=2)
    assert b"not both" in both.stderr
    degraded = terminal.run("launch", "--allow-degraded", "nonsense", "x.py", check=2)
    assert b"seccomp" in degraded.stderr and b"landlock" in degraded.stderr
    assert b"No such command" in terminal.run("nonsense", check=2).stderr


def test_version(terminal: Terminal) -> None:
    assert re.fullmatch(rb"piehost \d\S*\n", terminal.run("--version", check=0).stdout)


def test_run_directory_with_a_long_path(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    path = write_program(tmp_path, "hello.py", "print('ran')")
    done = Terminal(long).run("launch", path, check=125)
    assert b"too long" in done.stderr and b"XDG_RUNTIME_DIR" in done.stderr


def test_stdout_that_takes_nothing(server: Server, tmp_path: Path) -> None:
    path = write_program(tmp_path, "hello.py", "print('ran')")
    done = server.terminal.shell(f'"$@" launch {path} >/dev/full')
    error = done.stderr.decode()
    assert done.returncode == 125 and "No space left" in error and "try:" in error
    assert "Traceback" not in error
