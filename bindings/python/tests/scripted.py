"""Inferlets at the other end of a scripted controller, in this process or in one of their own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferlet import Model, Runtime, abi
from inferlet.errors import ClosedError
from scripted_controller import Controller
from scripted_device import (
    BOS,
    EOS,
    HIDDEN_SIZE,
    MAX_CONTEXT,
    PAGE_SIZE,
    PIECES,
    RING_BYTES,
    RING_IN_BYTES,
    VOCAB_SIZE,
    History,
    next_token,
)


def startup_block(
    args: Sequence[str] = (), deadline: float | None = None, **limits: int
) -> abi.Startup:
    model = abi.ModelInfo(
        name="scripted",
        description="a model that follows a script",
        traits=["Allocate", "Forward", "InputText", "Tokenize", "OutputText", "OutputEmbed"],
        architecture="Scripted",
        page_size=PAGE_SIZE,
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        max_context=MAX_CONTEXT,
        bos_token=BOS,
        eos_tokens=[EOS],
        chat_template="{{ messages }}",
    )
    caps = {
        "kv_pages": 1000,
        "embeds": 2000,
        "tokens": 1000,
        "commands": 10000,
        "frame_bytes": abi.MAX_FRAME_BYTES,
        "top_k": VOCAB_SIZE,
        "ring_bytes": RING_BYTES,
        "ring_in_bytes": RING_IN_BYTES,
        "history": 1000,
        "export_pages": 100,
        "children": 8,
        "subscriptions": 4,
        "http_streams": 3,
        "store_bytes": 1 << 20,
        **limits,
    }
    return abi.Startup(
        abi=1,
        version="1.2.3",
        id="test",
        user="ann",
        job="night",
        deadline=deadline,
        args=list(args),
        models=[model],
        limits=abi.Limits(**caps),
    )


def memfd(name: str, content: bytes) -> int:
    fd = os.memfd_create(name)
    os.write(fd, content)
    return fd


class Host:
    """The descriptors of one inferlet and the scripted controller at their other end."""

    def __init__(
        self,
        args: Sequence[str] = (),
        rule: Callable[[History], int] = next_token,
        deadline: float | None = None,
        **limits: int,
    ) -> None:
        startup = startup_block(args, deadline, **limits)
        ours, theirs = socket.socketpair()
        self.inferlet_socket = theirs
        ring_fd = memfd("ring", bytes(startup.limits.ring_bytes))
        self.ring = mmap.mmap(ring_fd, startup.limits.ring_bytes)
        ring_in_fd = memfd("ring in", bytes(startup.limits.ring_in_bytes))
        self.ring_in = mmap.mmap(ring_in_fd, startup.limits.ring_in_bytes)
        vocab = abi.build_vocab_table(PIECES, [i in (BOS, EOS) for i in range(VOCAB_SIZE)])
        self.fds = [
            theirs.fileno(),
            ring_fd,
            memfd("startup", abi.encoder.encode(startup)),
            memfd("vocab", vocab),
            ring_in_fd,
        ]
        self.controller = Controller(ours, self.ring, startup.limits, rule, self.ring_in)
        self.controller.start()
        self._runtime: Runtime | None = None

    @property
    def runtime(self) -> Runtime:
        """For a program in this process."""
        if self._runtime is None:
            self._runtime = Runtime(*self.fds)
        return self._runtime

    @property
    def model(self) -> Model:
        return Model(self.runtime, 0)

    def settle(self) -> None:
        """Returns when the controller has carried out everything sent."""
        self.runtime.connection.flush()
        self.model.tokenize("").result()

    def close(self) -> None:
        self.controller.sock.shutdown(socket.SHUT_RDWR)
        self.controller.join(10)
        if self._runtime is not None:
            with contextlib.suppress(ClosedError):  # sees the end, so it never writes again
                self._runtime.connection.poll()
        self.inferlet_socket.close()
        self.controller.sock.close()
        for fd in self.fds[1:]:
            os.close(fd)


@dataclass
class Outcome:
    status: int
    stdout: str
    stderr: str
    sent: list[bytes]
    controller: Controller

    @property
    def text(self) -> str:
        return b"".join(self.sent).decode()


def run_program(
    script: Path,
    args: Sequence[str] = (),
    *,
    tmp_path: Path,
    rule: Callable[[History], int] = next_token,
    inbox: Sequence[bytes] = (),
    env: dict[str, str] | None = None,
    prepare: Callable[[Host], None] | None = None,
) -> Outcome:
    """Runs `script` as piehost does: its own process, descriptors 3 to 7."""
    host = Host(args, rule)
    host.controller.inbox += inbox
    if prepare is not None:
        prepare(host)
    paths = [tmp_path / "stdout", tmp_path / "stderr"]
    outs = [os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY) for path in paths]
    # above every target, so that no duplicate overwrites a source
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in [*outs, *host.fds]]
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, str(script)],
        {
            "PIEHOST_ABI": "1",
            "PYTHONPATH": str(Path(__file__).parent.parent),
            "LANG": "C.UTF-8",
            **(env or {}),
        },
        file_actions=[
            (os.POSIX_SPAWN_DUP2, fd, target)
            for fd, target in zip(high, (1, 2, 3, 4, 6, 7, 5), strict=True)
        ],
    )
    host.inferlet_socket.close()  # so that its end is an end of file
    for fd in [*outs, *high]:
        os.close(fd)
    timer = threading.Timer(60, os.kill, (pid, signal.SIGKILL))
    timer.start()
    try:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        timer.cancel()
    host.controller.join(10)
    outcome = Outcome(
        status, paths[0].read_text(), paths[1].read_text(), host.controller.sent, host.controller
    )
    host.controller.sock.close()
    for fd in host.fds[1:]:
        os.close(fd)
    return outcome


def vectors(name: str) -> list[dict[str, Any]]:
    folder = Path(__file__).parents[2] / "vectors"
    loaded: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text())
    return loaded
