"""A launcher and what a host gives an inferlet, for the tests of the sandbox."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from piehost.host.shm import RingReader, create_ring, create_ring_in, seal_ring, sealed_memfd
from piehost.wire.launch import Exited, LauncherToHost, Rlimits, Spawn, Spawned, SpawnFailed
from piehost.wire.link import Link

ENVIRONMENT = {"PIEHOST_ABI": "1", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin", "HOME": "/"}
DEADLINE = 60.0


@dataclass
class Outcome:
    """How a launch went. `failed` or `exited` is set."""

    failed: SpawnFailed | None
    spawned: Spawned | None
    exited: Exited | None
    out: str
    err: str

    @property
    def code(self) -> int:
        """The exit code; minus the signal's number if one ended it."""
        assert self.exited is not None, f"it did not start: {self.failed}"
        return os.waitstatus_to_exitcode(self.exited.status)


class Running:
    """An inferlet as its host sees it: the other ends of its descriptors."""

    def __init__(self, launcher: LauncherProcess, spawn: Spawn) -> None:
        self.spawn = spawn
        self._launcher = launcher
        self.socket, theirs = socket.socketpair()
        ring = create_ring("ring", 1 << 16)
        seal_ring(ring)
        null = os.open(os.devnull, os.O_RDONLY)
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        self._pipes = (out, err)
        ring_in = create_ring_in("ring in", 1 << 16)
        self.ring_in = RingReader(ring_in, 1 << 16)
        fds = [null, out_end, err_end, theirs.fileno(), ring, ring_in]
        block = msgspec.msgpack.encode({"args": spawn.argv[1:]})
        fds += [sealed_memfd("startup", block), sealed_memfd("vocab", b"vocab")]
        launcher.link.send(spawn, fds)
        theirs.detach()
        for fd in fds:
            os.close(fd)

    def spawned(self) -> Spawned:
        message = self._launcher.message(self.spawn.seat)
        assert isinstance(message, Spawned), message
        return message

    def outcome(self) -> Outcome:
        """Waits until it has ended, or was refused."""
        failed = spawned = exited = None
        while failed is None and exited is None:
            message = self._launcher.message(self.spawn.seat)
            if isinstance(message, SpawnFailed):
                failed = message
            elif isinstance(message, Spawned):
                spawned = message
            else:
                exited = message
        texts = []
        for pipe in self._pipes:
            with os.fdopen(pipe, "rb") as file:
                texts.append(file.read().decode())
        self.socket.close()
        return Outcome(failed, spawned, exited, *texts)


class LauncherProcess:
    """`python -m piehost.host.sandbox.launcher`, and this end of its link."""

    def __init__(
        self,
        *options: str,
        first: str = "",
        under: Sequence[str] = (),
        **environment: str,
    ) -> None:
        """`first` is Python that runs before the launcher does, in its process; `under` is what it
        is run by (`plain_user.py`)."""
        self.under = under
        ours, theirs = socket.socketpair()
        main = f"{first}\nfrom piehost.host.sandbox.launcher import main\nmain()"
        program = ["-c", main] if first else ["-m", "piehost.host.sandbox.launcher"]
        self.process = subprocess.Popen(
            [*under, sys.executable, "-P", *program, "--fd", str(theirs.fileno()), *options],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self.link: Link[LauncherToHost] = Link(ours, LauncherToHost)
        self._seats = 0
        self._waiting: dict[int, list[LauncherToHost]] = {}

    def message(self, seat: int) -> LauncherToHost:
        """The next message about `seat`."""
        while not self._waiting.get(seat):
            sending = [self.link] if self.link.backlog else []
            ready, writable, _ = select.select([self.link], sending, [], DEADLINE)
            assert ready or writable, "the launcher does not answer"
            self.link.flush()
            for message, fds in self.link.receive():
                assert len(fds) == isinstance(message, Spawned)
                for fd in fds:
                    os.close(fd)
                self._waiting.setdefault(message.seat, []).append(message)
        return self._waiting[seat].pop(0)

    def start(self, path: str | Path, kind: str = "native", **changes: Any) -> Running:
        self._seats += 1
        fields: dict[str, Any] = {
            "seat": self._seats,
            "kind": kind,
            "path": str(path),
            "argv": [str(path)],
            "env": ENVIRONMENT,
            "cwd": "/",
            "profile": kind,
            "readable": [str(path)],
            "limits": Rlimits(address_space=2 << 30, open_files=64, file_size=1 << 20),
        }
        return Running(self, Spawn(**{**fields, **changes}))

    def run(self, path: str | Path, kind: str = "native", **changes: Any) -> Outcome:
        return self.start(path, kind, **changes).outcome()

    def close(self) -> None:
        self.link.close()
        assert self.process.wait(10) == 0


@contextmanager
def launcher(*options: str, **rest: Any) -> Iterator[LauncherProcess]:
    process = LauncherProcess(*options, **rest)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.close()


def without(*calls: str) -> str:
    """Python after which these system calls do not exist, for its process and all it starts."""
    return (
        "import ctypes\n"
        "from piehost.host.sandbox import bpf, kernel, policy\n"
        "kernel.set_no_new_privs()\n"
        f"numbers = [policy.syscalls()[name] for name in {calls}]\n"
        "leaves = {number: [bpf._Op(bpf._RET, bpf.ENOSYS)] for number in numbers}\n"
        "code = bpf._assemble(leaves, unknown=bpf.ALLOW, foreign=bpf.ALLOW).code\n"
        "program = kernel.SeccompProgram(code)\n"
        "ctypes.CDLL(None).syscall(317, 1, 0, ctypes.c_void_p(program.address))\n"
    )


def compile_c(source: Path, folder: Path, *options: str) -> Path:
    program = folder / source.stem
    command = [
        "gcc",
        "-D_GNU_SOURCE",
        "-O1",
        "-Wall",
        "-o",
        str(program),
        str(source),
        "-pthread",
        *options,
    ]
    subprocess.run(command, check=True)
    return program
