"""The processes the host starts, each with a link; the death of one is the end of its link."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from piehost.wire.link import Link, LinkClosed

T = TypeVar("T")
_MOST_WAIT = 10.0  # before a process that fails to start is started again
_REAP_SECONDS = 0.1  # until a dead process is looked for again that cannot be waited for
_CLOSE_SECONDS = 10.0  # a killed process may take this long to give its memory back


def wait_before(start: int) -> float:
    """Seconds to wait before start number `start` in a row, when those before have failed."""
    return 0.0 if start < 2 else min(_MOST_WAIT, 2.0 ** (start - 2) / 2)


class Child(Generic[T]):
    """A running process of ours. `on_end` is called once, when it has died or is given up."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: list[str],
        incoming: object,
        on_message: Callable[[T, list[int]], None],
        on_end: Callable[[], None],
        link_option: str = "--fd",
        passed: dict[str, socket.socket] | None = None,
        computes: bool = False,
    ) -> None:
        """Starts `python -m module LINK_OPTION N ARGUMENTS`. `passed`: more sockets, by option.
        `computes`: it may do so for long without reading its link, and reads nothing until the
        caller sets `reads`."""
        self.name = name
        self.computes = computes
        self.reads = not computes
        self.fault = ""  # why it was ended, if it did not end by itself
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._on_end: Callable[[], None] | None = on_end
        ours, theirs = socket.socketpair()
        given = {link_option: theirs, **(passed or {})}
        options = [text for option, sock in given.items() for text in (option, str(sock.fileno()))]
        runner = [sys.executable, "-P", "-m", "piehost.host.child", name, str(os.getpid()), module]
        self.process = subprocess.Popen(
            [*runner, *options, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=2,  # stdout is the host's own
            pass_fds=[sock.fileno() for sock in given.values()],
            start_new_session=True,  # Ctrl-C is for the host alone
        )
        theirs.close()
        self.link: Link[T] = Link(ours, incoming)
        self._loop.add_reader(self.link.fileno(), self._readable)

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, message: msgspec.Struct, fds: list[int] | None = None) -> None:
        """Sends or queues. A process that is gone takes nothing: `on_end` is about to say so."""
        if self._on_end is None:
            return
        with contextlib.suppress(LinkClosed):
            self.link.send(message, fds)
            if self.link.backlog:
                self._loop.add_writer(self.link.fileno(), self._writable)

    def ping(self) -> None:
        """Asks whether it reads its link: it has not `answered` until it does."""
        with contextlib.suppress(LinkClosed):  # reading reports it
            self.link.ping()
            if self.link.backlog:
                self._loop.add_writer(self.link.fileno(), self._writable)

    @property
    def ended(self) -> bool:
        """It is dead, or given up."""
        return self._on_end is None

    @property
    def answered(self) -> bool:
        """It owes no answer to a ping."""
        return not self.link.pinged

    @property
    def has_begun(self) -> bool:
        """It has said something, so it did start."""
        return self.link.heard

    def _writable(self) -> None:
        with contextlib.suppress(LinkClosed):  # reading reports it
            self.link.flush()
        if not self.link.backlog:
            self._loop.remove_writer(self.link.fileno())

    def _readable(self) -> None:
        try:
            received = self.link.receive()
        except (LinkClosed, msgspec.DecodeError):
            self.end()
            return
        for message, fds in received:
            try:
                self._on_message(message, fds)
            except Exception:  # a fault of ours; what comes after it is heard all the same
                traceback.print_exc()

    def end(self, fault: str = "") -> None:
        """Kills the process if it lives, and calls `on_end` unless that happened before.
        `fault`: why, if the process is to blame."""
        self.fault = self.fault or fault
        on_end, self._on_end = self._on_end, None
        if on_end is None:
            return
        self._loop.remove_reader(self.link.fileno())
        self._loop.remove_writer(self.link.fileno())
        self.link.close()
        self.process.kill()
        self._reap()
        on_end()

    def forget(self) -> None:
        """Kills the process; `on_end` is not called."""
        if self._on_end is not None:
            self._on_end = lambda: None
            self.end()

    def close(self) -> None:
        """`forget`, and waits until the process is gone (for the end of the host)."""
        self.forget()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_CLOSE_SECONDS)

    def _reap(self) -> None:
        """Collects the exit status once it is there: freeing much memory takes a while."""
        if self.process.poll() is not None:
            return
        try:
            pidfd = os.pidfd_open(self.process.pid)
        except OSError:  # no descriptor is left
            self._loop.call_later(_REAP_SECONDS, self._reap)
            return

        def dead() -> None:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
            self.process.poll()

        self._loop.add_reader(pidfd, dead)
