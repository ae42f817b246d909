"""What an inferlet finds when it starts: its descriptors, opened at first use, never at import.

The module's functions are the runtime calls of Pie (SOSP'25, Table 1) that tell an inferlet about
itself, `send` and `receive`. Importing touches no descriptor, because the zygote imports before
there are any.
"""

from __future__ import annotations

import atexit
import contextlib
import mmap
import os
import time
from functools import cached_property

import msgspec

from .abi import (
    ABI_VERSION,
    RING_IN_FD,
    RING_OUT_FD,
    SOCKET_FD,
    STARTUP_FD,
    VOCAB_FD,
    Quota,
    Receive,
    Send,
    Startup,
)
from .checks import message
from .connection import Connection
from .errors import ArgumentError, ClosedError, InferletError
from .future import Answer, Future, same
from .ring import RingIn, RingOut
from .text import Vocabulary


class Runtime:
    """The five descriptors of `docs/abi.md` section 1."""

    def __init__(
        self,
        socket_fd: int = SOCKET_FD,
        ring_fd: int = RING_OUT_FD,
        startup_fd: int = STARTUP_FD,
        vocab_fd: int = VOCAB_FD,
        ring_in_fd: int = RING_IN_FD,
    ) -> None:
        self._socket_fd = socket_fd
        self._ring_fd = ring_fd
        self._startup_fd = startup_fd
        self._vocab_fd = vocab_fd
        self._ring_in_fd = ring_in_fd
        self.last_handle = 0

    @cached_property
    def startup(self) -> Startup:
        """The start-up block. InferletError if this process was not started by piehost."""
        try:
            block = _read_all(self._startup_fd)
            startup = msgspec.msgpack.decode(block, type=Startup)
        except (OSError, msgspec.DecodeError) as error:
            raise InferletError(
                f"this program is an inferlet and was not started by piehost ({error})",
                "run it with: piehost launch PROGRAM -- ARGUMENTS",
            ) from None
        if startup.abi != ABI_VERSION:
            raise InferletError(
                f"piehost speaks ABI {startup.abi}, this SDK speaks {ABI_VERSION}",
                "install the inferlet package of the same version as piehost",
            )
        return startup

    @cached_property
    def connection(self) -> Connection:
        """The connection; what is queued when the program ends is sent then."""
        connection = Connection(self._socket_fd, self.startup.limits.frame_bytes)

        def finish_at_exit() -> None:
            with contextlib.suppress(ClosedError):
                connection.finish()

        atexit.register(finish_at_exit)
        return connection

    @cached_property
    def ring(self) -> RingOut:
        """The ring out, mapped read-only."""
        return RingOut(self._ring_fd, self.startup.limits.ring_bytes)

    @cached_property
    def ring_in(self) -> RingIn:
        """The ring in, mapped for writing."""
        return RingIn(self._ring_in_fd, self.startup.limits.ring_in_bytes)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary table, mapped read-only."""
        return Vocabulary(mmap.mmap(self._vocab_fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))

    def new_handle(self) -> int:
        """A handle number never used before in this program."""
        self.last_handle += 1
        return self.last_handle

    def get_arg(self, index: int) -> str:
        """Argument `index` (from 0) after `--`. ArgumentError if there are fewer."""
        args = self.startup.args
        if not 0 <= index < len(args):
            raise ArgumentError(
                f"argument {index} was asked for, {len(args)} were given",
                "give it after `--`: piehost launch PROGRAM -- ARGUMENTS",
            )
        return args[index]

    def time_left(self) -> float | None:
        """Seconds until the deadline, 0 once it has passed; None if there is none."""
        deadline = self.startup.deadline
        return None if deadline is None else max(0.0, deadline - time.time())

    def send(self, data: str | bytes) -> None:
        """Queues a message for whoever launched this inferlet; messages keep their bounds and
        order. ArgumentError if it is longer than 60,000 octets."""
        self.connection.append(Send(None, message(data)))

    def receive(self) -> Future[bytes]:
        """The next message from whoever launched this inferlet. ClosedError if there will be
        none."""
        return self.connection.ask(Receive(None), Answer(self.connection, same))

    def quota(self) -> Future[dict[str, float]]:
        """What is left, by the names of `docs/abi.md` section 8 (quota)."""
        return self.connection.ask(Quota(None), Answer(self.connection, same))


def _read_all(fd: int) -> bytes:
    """The whole file behind `fd`, wherever its offset is."""
    octets = bytearray()
    while part := os.pread(fd, 1 << 16, len(octets)):
        octets += part
    return bytes(octets)


runtime = Runtime()
"""The runtime of this process."""


def args() -> list[str]:
    """The arguments after `--` on the command line."""
    return list(runtime.startup.args)


def get_arg(index: int) -> str:
    """Argument `index` (from 0) after `--`. ArgumentError if there are fewer."""
    return runtime.get_arg(index)


def get_version() -> str:
    """The version of piehost that runs this inferlet."""
    return runtime.startup.version


def get_instance_id() -> str:
    """The id of this inferlet, as `piehost ps` and other inferlets see it."""
    return runtime.startup.id


def user() -> str:
    """Whose store, topics and exports this inferlet sees."""
    return runtime.startup.user


def job() -> str:
    """The job this inferlet is part of: the id of the inferlet that the client launched, or the
    name it gave the launch. Children share it."""
    return runtime.startup.job


def deadline() -> float | None:
    """When this inferlet will be ended, in seconds of Unix time; None: never."""
    return runtime.startup.deadline


def time_left() -> float | None:
    """Seconds until `deadline`, 0 once it has passed; None if there is none."""
    return runtime.time_left()


def quota() -> Future[dict[str, float]]:
    """What is left to this inferlet, by name: `kv_pages`, `embeds`, `tokens`, `commands`,
    `history`, `export_pages`, `children`, `subscriptions`, `http_streams`, `store_bytes`,
    `egress_bytes`, and `cpu_seconds` and `wall_seconds` if they are limited."""
    return runtime.quota()


def send(message: str | bytes) -> None:
    """Queues `message` for whoever launched this inferlet (at most 60,000 octets, else
    ArgumentError). Messages keep their bounds and order."""
    runtime.send(message)


def receive() -> Future[bytes]:
    """The next message from whoever launched this inferlet. ClosedError if there will be none.

    Keep the future if a wait for it is given up: it has the message when that comes.
    """
    return runtime.receive()


def flush() -> None:
    """Sends what is queued now.

    So does waiting for any answer, the program's end, and, under asyncio, the moment when every
    task that can run has run. A program without an event loop that computes for long between
    waits calls this for what should not wait that long, such as a `send`.
    """
    runtime.connection.flush()
