"""Real hosts and command lines for tests: start them, run programs on them, see what they leave."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from piehost.host.client import Client, Run, connect

PIEHOST = (sys.executable, "-m", "piehost.host.cli")
SMALL = ("--kv-pages", "2048", "--threads", "1")  # loads fast
SCRIPTED = ("--model", "scripted")  # faster still: there is nothing to load
WAIT = """
    from inferlet import receive, send

    send("ready")
    receive().result()
"""
_PTRACE_DETACH, _PTRACE_SEIZE, _PTRACE_INTERRUPT = 17, 0x4206, 0x4207
_WALL = 0x40000000  # of waitpid(2)
DEADLINE = 90.0  # seconds; only a hang reaches it


class Terminal:
    """A user's environment: one run directory, and what is run in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {**os.environ, "XDG_RUNTIME_DIR": str(directory)}
        self.environment.pop("PIEHOST_SOCKET", None)
        self.environment["PIEHOST_STORE"] = str(directory / "store.sqlite3")
        self.environment["XDG_CONFIG_HOME"] = str(directory / "config")

    @property
    def run_dir(self) -> Path:
        return self.directory / "piehost"

    @property
    def socket(self) -> Path:
        return self.run_dir / "host.sock"

    def start(
        self, *arguments: object, descriptors: int = 0, under: Sequence[object] = ()
    ) -> subprocess.Popen[bytes]:
        """`piehost ARGUMENTS` in a session of its own; stdin stays open. `descriptors`: at most.
        `under`: a command that it is run by."""
        limit = ("prlimit", f"--nofile={descriptors}") if descriptors else ()
        return subprocess.Popen(
            [*limit, *map(str, under), *PIEHOST, *map(str, arguments)],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def start_ready(self, *arguments: object) -> subprocess.Popen[bytes]:
        """`start`, once the program has sent "ready" (as WAIT does)."""
        process = self.start(*arguments)
        assert process.stdout is not None
        if process.stdout.read(5) != b"ready":
            _, err = process.communicate(timeout=DEADLINE)
            raise AssertionError(f"exit code {process.returncode}: {err.decode()}")
        return process

    def run(
        self, *arguments: object, stdin: bytes = b"", check: int | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """`piehost ARGUMENTS` to its end; `check` is the exit code it must have."""
        process = self.start(*arguments)
        try:
            out, err = process.communicate(stdin, DEADLINE)
        except BaseException:
            process.kill()
            raise
        done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
        if check is not None:
            assert done.returncode == check, (done.returncode, out.decode(), err.decode())
        return done

    def shell(self, script: str) -> subprocess.CompletedProcess[bytes]:
        """`script` in a shell whose "$@" is `piehost`."""
        return subprocess.run(
            ["sh", "-c", script, "sh", *PIEHOST],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=DEADLINE,
        )

    @contextlib.contextmanager
    def server(
        self, *options: object, descriptors: int = 0, under: Sequence[object] = ()
    ) -> Iterator[Server]:
        """A `piehost serve` that is ready; ended, with all it started, afterwards."""
        process = self.start("serve", *SMALL, *options, descriptors=descriptors, under=under)
        everyone: list[psutil.Process] = []
        try:
            assert process.stdout is not None
            line = process.stdout.readline().decode()
            if not line.startswith("piehost: serving"):
                _, err = process.communicate(timeout=DEADLINE)
                raise AssertionError(f"the server did not start: {line}{err.decode()}")
            everyone = family(process.pid)
            yield Server(self, process)
        finally:
            process.terminate()
            try:
                process.communicate(timeout=DEADLINE)
            finally:
                for left in everyone:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        left.kill()


class Server:
    """A running `piehost serve`."""

    def __init__(self, terminal: Terminal, process: subprocess.Popen[bytes]) -> None:
        self.terminal = terminal
        self.process = process

    @property
    def socket(self) -> Path:
        return self.terminal.socket

    def client(self) -> Client:
        return connect(str(self.socket))

    def child(self, name: str) -> int:
        """The pid of the host's process called `name`: backend, controller, launcher, zygote."""
        with self.client() as client:
            return client.stats().children[name]

    def kill(self, name: str) -> None:
        os.kill(self.child(name), signal.SIGKILL)


@contextlib.contextmanager
def new_terminal() -> Iterator[Terminal]:
    """In a folder with a short path, as sockets need."""
    with tempfile.TemporaryDirectory(prefix="pie-") as directory:
        yield Terminal(Path(directory))


def write_program(directory: Path, name: str, source: str) -> Path:
    path = directory / name
    path.write_text(textwrap.dedent(source))
    return path


def compile_c(directory: Path, name: str, source: str) -> Path:
    """A statically linked executable."""
    code = write_program(directory, f"{name}.c", source)
    path = directory / name
    subprocess.run(["gcc", "-O1", "-static", "-o", path, code], check=True, timeout=DEADLINE)
    return path


def started(
    client: Client, program: Path, *args: str, egress: Sequence[str] = (), **quotas: str
) -> Run:
    """A run that has said, in a message or on stdout, that it is ready."""
    run = client.launch(program, args, quotas, egress=egress)
    for event in run.events():
        if (data := getattr(event, "data", None)) is not None:
            assert data == b"ready", data
            return run
    raise AssertionError(run.take())


def has_its_group(client: Client, run: Run) -> bool:
    """It is in its control group, if it will have one."""
    details = client.inspect(run.id).details
    assert details is not None
    return "cgroup" not in details.controls or bool(details.quotas["threads"].used)


def processes(client: Client) -> list[psutil.Process]:
    return [psutil.Process(inferlet.pid) for inferlet in client.inferlets()]


def family(pid: int) -> list[psutil.Process]:
    """The process and all that descend from it."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@contextlib.contextmanager
def debugged(pid: int) -> Iterator[None]:
    """The process stands still, as one does under a debugger, which the host leaves alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(_PTRACE_SEIZE, pid, None, None) or libc.ptrace(
        _PTRACE_INTERRUPT, pid, None, None
    ):
        raise OSError(ctypes.get_errno(), f"ptrace of {pid}")
    assert eventually(lambda: psutil.Process(pid).status() == psutil.STATUS_TRACING_STOP)
    try:
        yield
    finally:
        os.waitpid(pid, _WALL)
        libc.ptrace(_PTRACE_DETACH, pid, None, None)


def eventually(what: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether `what` becomes true; polls, so that no test depends on how long something takes."""
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def all_gone(processes: list[psutil.Process]) -> bool:
    """Dead, and not waiting to be reaped by us. (psutil compares start times: no reused pids.)"""
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)
