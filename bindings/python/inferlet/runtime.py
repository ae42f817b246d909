"""What an inferlet finds when it starts: its descriptors, opened at first use, never at import.

The module's functions are the runtime calls of Pie (SOSP'25, Table 1): `get_arg`, `send`,
`receive`. Importing touches no descriptor, because the zygote imports before there are any.
"""

from __future__ import annotations

import atexit
import contextlib
import mmap
import os
from functools import cached_property
from typing import cast

import msgspec

from .abi import (
    ABI_VERSION,
    MAX_MESSAGE_BYTES,
    RING_OUT_FD,
    SOCKET_FD,
    STARTUP_FD,
    VOCAB_FD,
    Receive,
    Send,
    Startup,
)
from .connection import Connection
from .errors import ArgumentError, ClosedError, InferletError
from .future import Future
from .ring import Ring
from .text import Vocabulary


class Runtime:
    """The four descriptors of `docs/abi.md` section 1."""

    def __init__(
        self,
        socket_fd: int = SOCKET_FD,
        ring_fd: int = RING_OUT_FD,
        startup_fd: int = STARTUP_FD,
        vocab_fd: int = VOCAB_FD,
    ) -> None:
        self._socket_fd = socket_fd
        self._ring_fd = ring_fd
        self._startup_fd = startup_fd
        self._vocab_fd = vocab_fd
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

        def flush_at_exit() -> None:
            with contextlib.suppress(ClosedError):
                connection.flush()

        atexit.register(flush_at_exit)
        return connection

    @cached_property
    def ring(self) -> Ring:
        """The ring out, mapped read-only."""
        return Ring(self._ring_fd, self.startup.limits.ring_bytes)

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

    def send(self, message: str | bytes) -> None:
        """Queues `message` for whoever launched this inferlet; messages keep their bounds and
        order. ArgumentError if it is longer than 60,000 octets."""
        data = message.encode() if isinstance(message, str) else message
        if len(data) > MAX_MESSAGE_BYTES:
            raise ArgumentError(
                f"the message has {len(data)} octets, a message holds {MAX_MESSAGE_BYTES}",
                "send it in parts",
            )
        self.connection.append(Send(None, data))

    def receive(self) -> Future[bytes]:
        """The next message from whoever launched this inferlet. ClosedError if there will be
        none."""
        connection = self.connection
        return connection.ask(Receive(None), Future(connection, lambda v: cast(bytes, v)))


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


def send(message: str | bytes) -> None:
    """Queues `message` for whoever launched this inferlet (at most 60,000 octets, else
    ArgumentError). Messages keep their bounds and order."""
    runtime.send(message)


def receive() -> Future[bytes]:
    """The next message from whoever launched this inferlet. ClosedError if there will be none."""
    return runtime.receive()


def flush() -> None:
    """Sends what is queued now; waiting for any answer does so too."""
    runtime.connection.flush()
