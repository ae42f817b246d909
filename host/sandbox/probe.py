"""Proof that the sandbox holds on this machine, for `piehost doctor`.

Nothing is concluded from versions or configuration: real inferlets try to get out (`attempts.py`),
started by real launchers with the real policies, and what came of it is compared.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import IO, Final

import msgspec
from msgspec import Struct

from piehost.host.shm import create_ring, create_ring_in, seal_ring, sealed_memfd
from piehost.wire.launch import Exited, LauncherToHost, Rlimits, Spawn, Spawned, SpawnFailed
from piehost.wire.link import Link, LinkClosed

from .identity import DAC_OVERRIDE, DAC_READ_SEARCH

_ATTEMPTS: Final = str(Path(__file__).with_name("attempts.py"))
_SECONDS: Final = 20.0
_LIMITS: Final = Rlimits(address_space=2 << 30, open_files=64, file_size=64 << 10, threads=32)
_ENV: Final = {"PIEHOST_ABI": "1", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin", "HOME": "/"}


class Check(Struct):
    """One control. `ok` if the attempt ended as it must; then `cost` and `hint` are empty. If it is
    not `required`, inferlets are started without it."""

    name: str
    stops: str
    attempted: str
    got: str
    ok: bool
    cost: str = ""  # what is not stopped without it
    hint: str = ""
    required: bool = True


# an attempt of attempts.py: (its name, control, what that stops, the attempt in words, good ends)
_TRIES: Final = (
    ("open_root", "landlock", "reading other files", "open /", {"EACCES"}),
    ("see_file", "mounts", "seeing names of files", "stat /etc/passwd", {"ENOENT"}),
    ("create_file", "read-only files", "writing files", "create a file in /tmp",
     {"EPERM", "EACCES"}),
    ("socket", "network", "reaching the network", "socket(AF_INET)", {"EPERM"}),
    ("connect", "unix sockets", "talking to local services", "connect()", {"EPERM"}),
    ("fork", "fork", "making processes", "fork()", {"EPERM"}),
    ("exec", "exec (Python)", "running programs", "execve /bin/true", {"ENOSYS"}),
    ("write_and_execute", "W^X", "running injected code", "mmap writable and executable",
     {"EPERM"}),
    ("shared_memory", "shared memory", "memory beyond its limit", "mmap shared memory", {"EPERM"}),
    ("memfd", "memfd", "memory beyond its limit", "memfd_create()", {"EPERM"}),
    ("address_space", "rlimit: memory", "using all memory", "map 8 GiB under 2 GiB", {"ENOMEM"}),
    ("threads", "rlimit: threads", "using all threads", "1,000 threads under 32",
     {f"{_LIMITS.threads} at once"}),
    ("descriptors", "rlimit: descriptors", "using all descriptors", "dup() beyond 64", {"EMFILE"}),
    ("read_ring", "ring out", "(must work)", "map the ring for reading", {"done"}),
    ("write_ring", "seal FUTURE_WRITE", "writing into the ring", "map the ring for writing",
     {"EPERM", "EACCES"}),
    ("sibling_memory", "siblings: memory", "reading other inferlets", "open /proc/PID/mem",
     {"EACCES", "ENOENT"}),
    ("sibling_signal", "siblings: signals", "ending other inferlets", "kill(PID, SIGKILL)",
     {"EPERM"}),
)  # fmt: skip

_HINTS: Final = {
    "landlock": "Linux 5.13 or later with landlock in its lsm= list (see /sys/kernel/security/lsm)",
    "seccomp": "a kernel with CONFIG_SECCOMP_FILTER; in a container, one that allows seccomp(2)",
    "seal FUTURE_WRITE": "Linux 5.1 or later",
    "pidfd": "Linux 5.4 or later",
    "identity": "root with CAP_SETUID, CAP_SETGID and CAP_KILL, or user namespaces for everybody"
    " (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone; in a container, a seccomp"
    " profile that allows unshare)",
    "mounts": "Linux 5.12 or later, and CAP_SYS_ADMIN or user namespaces with capabilities in them"
    " (Ubuntu: sysctl kernel.apparmor_restrict_unprivileged_userns=0)",
    "rlimit: threads": "Linux 5.14 or later, and what `identity` needs",
}
_STOPS: Final = {
    "landlock": "reading other files",
    "seccomp": "forbidden system calls",
    "identity": "acting as the host's user",
    "mounts": "seeing names of files",
}
_COSTS: Final = {
    "landlock": "every inferlet can open what its user can, if its mount namespace shows it",
    "seccomp": "every inferlet can make any system call: it is hardly contained at all",
    "identity": "inferlets are the host's user: only Landlock and seccomp keep them from each other"
    " and from the host, and their threads are not counted for each by itself",
    "mounts": "an inferlet can learn of any file that it exists, its size, owner and times",
    "rlimit: threads": "an inferlet can have as many threads as fit into its address space",
}
_NOT_REQUIRED: Final = {"mounts"}
_FAULT: Final = (
    "this is a fault of piehost or of a very unusual kernel: do not run untrusted inferlets"
)


def probe() -> list[Check]:
    """Every control, proved. Takes about a second; starts and ends its own processes."""
    checks: list[Check] = []
    try:
        with _Probe("python") as python, _Probe("native") as native:
            for act in (_supervision, _tries, _forbidden_call, _file_size, _core):
                checks += act(python)
            checks += _identity(native) + _second_exec(native)
            missing = python.missing | native.missing
    except (LinkClosed, OSError, TimeoutError) as error:
        return [
            *checks,
            _check("launcher", "everything", "start inferlets", f"failed: {error}", False),
        ]
    if missing:
        for check in checks:
            if not check.ok and check.name not in _HINTS:
                check.hint = f"follows from the missing {' and '.join(missing)}"
        checks = [check for check in checks if check.name not in missing]
    return [
        *(
            Check(name, _STOPS[name], "use it", failed.message, False, _COSTS[name], failed.hint)
            for name, failed in missing.items()
        ),
        *checks,
    ]


def _check(name: str, stops: str, attempted: str, got: str, ok: bool) -> Check:
    check = Check(name, stops, attempted, got, ok, required=name not in _NOT_REQUIRED)
    if not ok:
        check.cost = _COSTS.get(name, f"an inferlet is not kept from {stops}")
        check.hint = _HINTS.get(name, _FAULT)
    return check


def _supervision(probe: _Probe) -> list[Check]:
    """A running inferlet is looked at, then ended by its pidfd."""
    running = probe.start("wait")
    status = Path(f"/proc/{running.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    privileges = fields.get("NoNewPrivs", "?")
    held = max(int(fields.get(f"Cap{which}", "-1"), 16) for which in ("Inh", "Prm", "Eff", "Amb"))
    reads = {0: "none", DAC_READ_SEARCH: "DAC_READ_SEARCH", DAC_OVERRIDE: "DAC_OVERRIDE"}
    running.kill()
    ended = probe.wait(running)
    killed = os.waitstatus_to_exitcode(ended.status) == -signal.SIGKILL
    return [
        _check(
            "no_new_privs",
            "gaining privileges",
            "read NoNewPrivs of an inferlet",
            privileges,
            privileges == "1",
        ),
        _check(
            "capabilities",
            "root's rights",
            "read the capabilities of an inferlet",
            reads.get(held, f"{held:#x}") + (", to read closed folders" if held else ""),
            held in reads,
        ),
        _check(
            "pidfd",
            "ending the wrong process",
            "end an inferlet by its pidfd",
            "it ended" if killed else f"status {ended.status}",
            killed,
        ),
    ]


def _identity(probe: _Probe) -> list[Check]:
    """Native ones: no script is dumpable, so a plain user may not look at its namespaces."""
    running = [probe.start("60", program="/usr/bin/sleep") for _ in range(2)]
    users = [_user(inferlet.pid) for inferlet in running]
    for inferlet in running:
        inferlet.kill()
        probe.wait(inferlet)
    apart = users[0] != users[1] and _user(os.getpid()) not in users
    got = " and ".join(map(_show_user, users))
    return [
        _check("identity", "acting as the host's user", "compare two inferlets' users", got, apart)
    ]


def _user(pid: int) -> tuple[int, int | None]:
    """(its user id as the host sees it, its user namespace if the host may see that)."""
    owner = next(
        line.split()[1]
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("Uid:")
    )
    try:
        return int(owner), Path(f"/proc/{pid}/ns/user").stat().st_ino
    except PermissionError:  # root without CAP_SYS_PTRACE
        return int(owner), None


def _show_user(user: tuple[int, int | None]) -> str:
    ours = user[1] in (None, _user(os.getpid())[1])
    return f"user {user[0]}" + ("" if ours else f" in namespace {user[1]}")


def _tries(probe: _Probe) -> list[Check]:
    sibling = probe.start("wait")
    trying = probe.start(str(sibling.pid))
    probe.wait(trying)
    trying.output.seek(0)
    text = trying.output.read().decode()
    got: dict[str, str] = json.loads(text) if text else {}
    sibling.kill()
    probe.wait(sibling)
    return [
        _check(name, stops, words, got.get(key, "no answer"), got.get(key) in good)
        for key, name, stops, words, good in _TRIES
    ]


def _forbidden_call(probe: _Probe) -> list[Check]:
    ended = probe.wait(probe.start("ptrace"))
    killed = os.waitstatus_to_exitcode(ended.status) == -signal.SIGSYS
    got = f"killed: {ended.violation}" if killed else f"status {ended.status}"
    return [_check("seccomp", "forbidden system calls", "ptrace()", got, killed)]


def _file_size(probe: _Probe) -> list[Check]:
    writing = probe.start("write")
    probe.wait(writing)
    size = os.fstat(writing.output.fileno()).st_size
    got = f"{size >> 10} KiB written"
    ok = size == _LIMITS.file_size
    return [_check("rlimit: file size", "filling the disk", "write 1 MiB under 64 KiB", got, ok)]


def _core(probe: _Probe) -> list[Check]:
    ended = probe.wait(probe.start("abort"))
    dumped = os.WCOREDUMP(ended.status)
    aborted = os.waitstatus_to_exitcode(ended.status) == -signal.SIGABRT
    got = "a core was dumped" if dumped else "no core" if aborted else f"status {ended.status}"
    return [
        _check("rlimit: core", "leaving memory on disk", "abort()", got, aborted and not dumped)
    ]


def _second_exec(probe: _Probe) -> list[Check]:
    """The one exec of a native inferlet is used up when it starts: `env` cannot run `true`."""
    running = probe.start("/bin/true", program="/usr/bin/env")
    code = os.waitstatus_to_exitcode(probe.wait(running).status)
    got = "refused" if code == 126 else f"exit code {code}"
    return [_check("exec (native)", "running programs", "env runs /bin/true", got, code == 126)]


class _Running:
    """An inferlet, and the file its standard output and error go to."""

    def __init__(self, spawned: Spawned, pidfd: int, output: IO[bytes]) -> None:
        self.seat = spawned.seat
        self.pid = spawned.pid
        self.pidfd = pidfd
        self.output = output

    def kill(self) -> None:
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)


class _Probe:
    """A launcher of one kind. `missing`: the controls it cannot have, and what it said of them."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._seat = 0
        self._arrived: deque[tuple[LauncherToHost, list[int]]] = deque()
        self._ended: dict[int, Exited] = {}
        self.missing: dict[str, SpawnFailed] = {}

    def __enter__(self) -> _Probe:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "piehost.host.sandbox.launcher"]
                + ["--fd", str(theirs.fileno())]
                + ["--preload"] * (self._kind == "python"),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._link: Link[LauncherToHost] = Link(ours, LauncherToHost)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._link.close()
        self._process.wait()

    def start(self, *arguments: str, program: str = _ATTEMPTS) -> _Running:
        """Controls that this machine lacks are noted and given up."""
        while True:
            output = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the _Running)
            message, fds = self._spawn([program, *arguments], output.fileno())
            if isinstance(message, Spawned):
                return _Running(message, fds[0], output)
            output.close()
            if not isinstance(message, SpawnFailed) or message.stage in self.missing:
                raise OSError(f"an inferlet did not start: {message}")
            self.missing[message.stage] = message

    def wait(self, running: _Running) -> Exited:
        while running.seat not in self._ended:
            self._next()
        os.close(running.pidfd)
        return self._ended[running.seat]

    def _spawn(self, argv: list[str], output: int) -> tuple[LauncherToHost, list[int]]:
        self._seat += 1
        program = os.path.realpath(argv[0])
        spawn = Spawn(
            seat=self._seat,
            kind=self._kind,
            path=program,
            argv=argv,
            env=_ENV,
            cwd="/",
            profile=self._kind,
            readable=[program],
            limits=_LIMITS,
            waived=list(self.missing),
        )
        ours, theirs = socket.socketpair()
        ring = create_ring("probe", 4096)
        seal_ring(ring)
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        block = msgspec.msgpack.encode({"args": argv[1:]})
        rings = [ring, create_ring_in("probe", 4096)]
        made = [null, *rings, sealed_memfd("startup", block), sealed_memfd("vocab", b"")]
        with ours, theirs:
            self._link.send(spawn, [null, output, output, theirs.fileno(), *made[1:]])
        for fd in made:
            os.close(fd)
        while True:
            message, fds = self._next()
            if not isinstance(message, Exited):  # that is another's
                return message, fds

    def _next(self) -> tuple[LauncherToHost, list[int]]:
        deadline = time.monotonic() + _SECONDS
        poll = select.poll()
        poll.register(self._link, select.POLLIN)
        while not self._arrived:
            if not poll.poll(1000 * max(0, deadline - time.monotonic())):
                raise TimeoutError(f"the launcher does not answer within {_SECONDS:.0f} s")
            self._arrived.extend(self._link.receive())
        message, fds = self._arrived.popleft()
        if isinstance(message, Exited):
            self._ended[message.seat] = message
        return message, fds
