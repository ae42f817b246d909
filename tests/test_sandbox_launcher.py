"""The launcher: what starts, what is refused and why, how ends are told, what is left behind."""

from __future__ import annotations

import errno
import os
import select
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from piehost.wire.launch import Rlimits, SpawnFailed

from .sandbox_harness import LauncherProcess, compile_c, launcher, without

ATTACKERS = Path(__file__).parent / "attackers"
LIMITS = {"address_space": 2 << 30, "open_files": 64, "file_size": 1 << 20}


@pytest.fixture(scope="module")
def native() -> Iterator[LauncherProcess]:
    with launcher() as process:
        yield process


@pytest.fixture(scope="module")
def zygote() -> Iterator[LauncherProcess]:
    with launcher("--preload", SECRET_OF_THE_HOST="hunter2") as process:
        yield process


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_c(ATTACKERS / "echo.c", tmp_path_factory.mktemp("echo"), "-static")


def c_program(folder: Path, body: str, *options: str) -> Path:
    source = folder / "program.c"
    headers = ("errno", "signal", "stdio", "stdlib", "string", "sys/resource", "unistd", "fcntl")
    text = "".join(f"#include <{header}.h>\n" for header in headers)
    source.write_text(f"{text}int main(int argc, char **argv) {{ {body} }}\n")
    return compile_c(source, folder, *(options or ("-static",)))


def script(folder: Path, text: str, name: str = "main.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refusal(process: LauncherProcess, path: Path, kind: str = "native", **changes) -> SpawnFailed:  # type: ignore[no-untyped-def]
    failed = process.run(path, kind, **changes).failed
    assert failed is not None and failed.message and failed.hint
    return failed


# --- refusals ------------------------------------------------------------------------------------


def test_a_missing_file(native: LauncherProcess, zygote: LauncherProcess, tmp_path: Path) -> None:
    assert refusal(native, tmp_path / "nothing").errno == errno.ENOENT
    assert refusal(zygote, tmp_path / "nothing.py", "python").errno == errno.ENOENT
    assert refusal(native, tmp_path).errno == errno.EACCES  # a folder
    assert refusal(zygote, tmp_path, "python").errno == errno.EISDIR


def test_no_execute_permission(native: LauncherProcess, tmp_path: Path) -> None:
    program = c_program(tmp_path, "return 0;")
    program.chmod(0o644)
    failed = refusal(native, program)
    assert failed.errno == errno.EACCES and "chmod +x" in failed.hint


@pytest.mark.parametrize(
    ("at", "data", "word"),
    [
        (18, struct.pack("<H", 183), "aarch64"),
        (18, struct.pack("<H", 3), "32-bit x86"),
        (4, b"\x01", "x32"),
        (0, b"#!/bin/sh", "#!"),
        (0, b"PK", "not an ELF"),
        (56, b"\0\0", "no program headers"),
    ],
)
def test_a_wrong_format(
    native: LauncherProcess, tmp_path: Path, at: int, data: bytes, word: str
) -> None:
    program = c_program(tmp_path, "return 0;")
    image = bytearray(program.read_bytes())
    image[at : at + len(data)] = data
    program.write_bytes(image)
    failed = refusal(native, program)
    assert failed.errno == errno.ENOEXEC and word in failed.message


def test_a_missing_dynamic_linker(native: LauncherProcess, tmp_path: Path) -> None:
    program = c_program(tmp_path, "return 0;", "-Wl,--dynamic-linker=/lib/ld-nowhere.so.1")
    failed = refusal(native, program)
    assert failed.errno == errno.ENOENT and "/lib/ld-nowhere.so.1" in failed.message


@pytest.mark.parametrize("linker", ["/", "/etc/passwd", "/tmp/../etc", "secret"])
def test_a_dynamic_linker_of_the_programs_choice(
    native: LauncherProcess, tmp_path: Path, linker: str
) -> None:
    """It would be granted to the inferlet for reading."""
    program = c_program(tmp_path, "return 0;", f"-Wl,--dynamic-linker={linker}")
    assert "dynamic linker" in refusal(native, program).message


@pytest.mark.parametrize("offset", [(1 << 63) - 8, 1 << 63, (1 << 64) - 1])
def test_headers_out_of_this_world(native: LauncherProcess, tmp_path: Path, offset: int) -> None:
    program = c_program(tmp_path, "return 0;")
    image = bytearray(program.read_bytes())
    struct.pack_into("<Q", image, 32, offset)  # e_phoff
    program.write_bytes(image)
    assert refusal(native, program).errno in (errno.ENOEXEC, errno.EINVAL)
    assert native.run(c_program(tmp_path, "return 3;")).code == 3


@pytest.mark.parametrize(("kind", "flags"), [("GNU_STACK", 7), ("LOAD", 7)])
def test_writable_code(native: LauncherProcess, tmp_path: Path, kind: str, flags: int) -> None:
    program = c_program(tmp_path, "return 0;")
    image = bytearray(program.read_bytes())
    (table,), (count,) = struct.unpack_from("<Q", image, 32), struct.unpack_from("<H", image, 56)
    wanted = {"LOAD": 1, "GNU_STACK": 0x6474E551}[kind]
    segment = next(
        at
        for at in range(table, table + 56 * count, 56)
        if struct.unpack_from("<I", image, at) == (wanted,)
    )
    struct.pack_into("<I", image, segment + 4, flags)
    program.write_bytes(image)
    failed = refusal(native, program)
    assert failed.stage == "exec" and "executable" in failed.message


def test_failures_inside_the_child(native: LauncherProcess, echo: Path) -> None:
    assert refusal(native, echo, cwd="/nowhere").stage == "chdir"
    failed = refusal(native, echo, argv=["echo", "x" * (1 << 20)])
    assert (failed.stage, failed.errno) == ("exec", errno.E2BIG)
    assert (
        refusal(native, echo, limits=Rlimits(**{**LIMITS, "open_files": 1 << 40})).stage
        == "rlimits"
    )


def test_wrong_kinds_profiles_and_descriptors(native: LauncherProcess, echo: Path) -> None:
    assert refusal(native, echo, "python").stage == "profile"
    assert refusal(native, echo, profile="jit").stage == "profile"
    assert refusal(native, echo, profile="python").stage == "profile"
    spawn = native.start(echo).spawn
    native.link.send(spawn, [0, 1, 2])
    messages = [native.message(spawn.seat) for _ in range(3)]
    assert any(isinstance(m, SpawnFailed) and m.stage == "descriptors" for m in messages)


def test_less_memory_than_the_interpreter_takes(zygote: LauncherProcess, tmp_path: Path) -> None:
    little = Rlimits(**{**LIMITS, "address_space": 16 << 20})
    failed = refusal(zygote, script(tmp_path, "print(1)"), "python", limits=little)
    assert failed.errno == errno.ENOMEM and "16 MiB" in failed.message


def test_a_missing_control_is_refused_unless_waived(tmp_path: Path) -> None:
    """The launcher runs where seccomp(2) and Landlock do not exist."""
    program = c_program(tmp_path, 'printf("%d", open("/", 0) >= 0); return 0;')
    path = script(tmp_path, "import os; print(os.open('/', 0) >= 0)")
    missing = without("seccomp", "landlock_create_ruleset")
    both = ["landlock", "seccomp"]
    with launcher(first=missing) as process:
        assert refusal(process, program).stage == "landlock"
        failed = refusal(process, program, waived=["landlock"])
        assert failed.stage == "seccomp" and "--allow-degraded=seccomp" in failed.hint
        assert process.run(program, waived=both).out == "1"
    with launcher("--preload", first=missing) as process:
        assert refusal(process, path, "python", waived=["seccomp"]).stage == "landlock"
        assert process.run(path, "python", waived=both).out == "True\n"


def test_a_waived_control_that_is_there_holds(native: LauncherProcess, tmp_path: Path) -> None:
    program = c_program(tmp_path, 'printf("%d", open("/", 0) >= 0); return 0;')
    assert native.run(program, waived=["landlock", "seccomp"]).out == "0"


# --- ends ----------------------------------------------------------------------------------------


def test_exit_codes_signals_and_usage(native: LauncherProcess, tmp_path: Path) -> None:
    spin = "for (volatile long i = 0; i < 200000000; i++); return 42;"
    outcome = native.run(c_program(tmp_path, spin))
    assert outcome.code == 42 and outcome.exited is not None and outcome.exited.violation is None
    assert outcome.exited.user_seconds > 0 and outcome.exited.max_rss_bytes > 1 << 16
    assert native.run(c_program(tmp_path, "abort();")).code == -signal.SIGABRT
    assert (
        native.run(c_program(tmp_path, "*(volatile int *)8 = 1; return 0;")).code == -signal.SIGSEGV
    )
    # what Python ignores is at its default again
    assert native.run(c_program(tmp_path, "raise(SIGPIPE); return 0;")).code == -signal.SIGPIPE


def test_limits_hold(native: LauncherProcess, tmp_path: Path) -> None:
    program = c_program(
        tmp_path,
        "int what[] = {RLIMIT_AS, RLIMIT_NOFILE, RLIMIT_FSIZE, RLIMIT_STACK, RLIMIT_CORE};"
        "for (int i = 0; i < 5; i++) { struct rlimit r; getrlimit(what[i], &r);"
        ' printf("%ld %ld ", (long)r.rlim_cur, (long)r.rlim_max); }'
        ' printf("%d", malloc(3L << 30) == NULL); return 0;',
    )
    limits = Rlimits(**LIMITS, stack=4 << 20)
    values = [limits.address_space, limits.open_files, limits.file_size, limits.stack, 0]
    assert [*map(int, native.run(program, limits=limits).out.split())] == [
        *(value for value in values for _ in range(2)),
        1,
    ]


def test_cpu_seconds_cannot_be_handled_away(native: LauncherProcess, tmp_path: Path) -> None:
    program = c_program(tmp_path, "signal(SIGXCPU, SIG_IGN); for (;;);")
    outcome = native.run(program, limits=Rlimits(**LIMITS, cpu_seconds=1))
    assert outcome.code == -signal.SIGKILL


def test_nothing_is_left_behind(native: LauncherProcess, echo: Path, tmp_path: Path) -> None:
    def held() -> tuple[int, list[str]]:
        children = Path(f"/proc/{native.process.pid}/task/{native.process.pid}/children")
        return len(os.listdir(f"/proc/{native.process.pid}/fd")), children.read_text().split()

    native.run(echo, cwd="/nowhere")  # whatever is made once is made now
    while held()[1]:
        time.sleep(0.01)
    before = held()
    crowd = [native.start(echo) for _ in range(20)]
    pids = [inferlet.spawned().pid for inferlet in crowd]
    assert set(pids) <= {int(pid) for pid in held()[1]} and len(set(pids)) == 20
    for inferlet in crowd:
        inferlet.socket.close()
    assert [inferlet.outcome().code for inferlet in crowd] == [0] * 20
    for _ in range(20):
        refusal(native, tmp_path / "nothing")
        refusal(native, echo, cwd="/nowhere")
    deadline = time.monotonic() + 30
    while held() != before and time.monotonic() < deadline:  # the last refused child is reaped
        time.sleep(0.01)
    assert held() == before


@pytest.mark.parametrize("how", ["link", "kill"])
def test_inferlets_die_with_their_launcher(echo: Path, how: str) -> None:
    process = LauncherProcess()
    inferlet = process.start(echo)
    pid = inferlet.spawned().pid
    pidfd = os.pidfd_open(pid)
    if how == "link":
        process.close()
    else:
        process.process.kill()
        process.process.wait()
    ended, _, _ = select.select([pidfd], [], [], 30)
    os.close(pidfd)
    assert ended, "it outlives its launcher"


def test_a_launcher_with_threads_refuses_to_serve() -> None:
    first = (
        "import threading as t, time\nt.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    )
    process = LauncherProcess(first=first)
    assert process.process.wait(30) == 1


# --- Python --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "err"),
    [
        ("", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("raise SystemExit", 0, ""),
        ("import sys; sys.exit('stopped: no answer')", 1, "stopped: no answer\n"),
        ("import os; os._exit(9)", 9, ""),
        ("import sys; print('x', end='', file=sys.stderr)", 0, "x"),
    ],
)
def test_exit_codes_of_scripts(
    zygote: LauncherProcess, tmp_path: Path, text: str, code: int, err: str
) -> None:
    outcome = zygote.run(script(tmp_path, text), "python")
    assert (outcome.code, outcome.err) == (code, err)


def test_a_traceback_shows_the_script_only(zygote: LauncherProcess, tmp_path: Path) -> None:
    path = script(tmp_path, "def f():\n    return 1 / 0\nprint('before', end='')\nf()\n")
    outcome = zygote.run(path, "python")
    assert (outcome.code, outcome.out) == (1, "before")
    assert outcome.err == (
        "Traceback (most recent call last):\n"
        f'  File "{path}", line 4, in <module>\n    f()\n'
        f'  File "{path}", line 2, in f\n    return 1 / 0\n           ~~^~~\n'
        "ZeroDivisionError: division by zero\n"
    )


def test_a_syntax_error_shows_its_place(zygote: LauncherProcess, tmp_path: Path) -> None:
    path = script(tmp_path, "x = 1\nprint(x\n")
    outcome = zygote.run(path, "python")
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert outcome.err.startswith(f'  File "{path}", line 2\n    print(x\n         ^\nSyntaxError')


def test_a_script_finishes_what_it_has_begun(zygote: LauncherProcess, tmp_path: Path) -> None:
    text = (
        "import atexit, sys, threading, time\n"
        "atexit.register(print, 'at exit')\n"
        "threading.Thread(target=lambda: (time.sleep(0.05), print('thread'))).start()\n"
        "sys.stdout.write('unflushed\\n' * 3)\n"
    )
    outcome = zygote.run(script(tmp_path, text), "python")
    assert (outcome.code, outcome.out) == (0, "unflushed\n" * 3 + "thread\nat exit\n")


def test_forks_of_the_zygote_draw_different_numbers(
    zygote: LauncherProcess, tmp_path: Path
) -> None:
    text = "import random, numpy, uuid\nprint(random.random(), numpy.random.random(), uuid.uuid4())"
    path = script(tmp_path, text)
    draws = [zygote.run(path, "python").out.split() for _ in range(3)]
    assert all(len(set(column)) == 3 for column in zip(*draws, strict=True))


def test_scripts_are_alone(zygote: LauncherProcess, tmp_path: Path) -> None:
    """No name, no environment, no module of the host or of another script is found in a script."""
    other = script(tmp_path, "import sys, json\njson.mark = 1\nsys.path.append('/x')", "other.py")
    assert zygote.run(other, "python").code == 0
    text = (
        "import sys, os, json, gc\n"
        "sys.stdout.write(f'{sorted(globals())} {sys.argv} {hasattr(json, \"mark\")} ')\n"
        "sys.stdout.write(f'{\"/x\" in sys.path} {sys.path[0]} {gc.isenabled()}\\n')\n"
        "held = open('/proc/self/environ').read() if os.path.exists('x') else ''\n"
        "print('SECRET_OF_THE_HOST' in os.environ)\n"
    )
    path = script(tmp_path, text)
    first, second = zygote.run(path, "python", argv=[str(path), "a"]).out.splitlines()
    names = [
        "__builtins__",
        "__doc__",
        "__file__",
        "__loader__",
        "__name__",
        "__package__",
        "__spec__",
    ]
    modules = ["gc", "json", "os", "sys"]
    assert first == f"{names + modules} {[str(path), 'a']} False False {tmp_path} True"
    assert second == "False"
    environment = Path(f"/proc/{zygote.process.pid}/environ").read_bytes()
    assert b"hunter2" not in environment  # so not in the memory that its children share


def test_lost_output_is_an_exit_code(zygote: LauncherProcess, tmp_path: Path) -> None:
    path = script(tmp_path, "import os, sys\nos.close(1)\nsys.stdout.write('x')")
    assert zygote.run(path, "python").code == 120


def test_the_process_carries_the_programs_name(
    zygote: LauncherProcess, native: LauncherProcess, echo: Path
) -> None:
    for process, path, kind in (
        (zygote, ATTACKERS / "echo.py", "python"),
        (native, echo, "native"),
    ):
        inferlet = process.start(path, kind)
        pid = inferlet.spawned().pid
        assert (
            subprocess.check_output(["ps", "-o", "comm=", "-p", str(pid)], text=True).strip()
            == path.name
        )
        inferlet.socket.close()
        assert inferlet.outcome().code == 0
