"""A message link over an inherited stream socketpair, with file descriptors where needed.

On the wire: u32 body length, u8 number of descriptors, body (msgpack). End-of-file is `LinkClosed`:
that is how a process learns of its peer's death. Whoever receives also answers pings, which have no
body: that is how it learns of a peer that lives and does nothing.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections import deque
from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")
_HEAD = struct.Struct("<IB")
_MAX_FDS = 16
_CHUNK = 1 << 18
_PING, _PONG = 0, 1  # in the place of the number of descriptors


class LinkClosed(Exception):
    """The process at the other end is gone."""


class Link(Generic[T]):
    """One end. `incoming` is the (union of) struct type(s) this end receives."""

    def __init__(self, sock: socket.socket, incoming: object) -> None:
        self.sock = sock
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(incoming)
        self._encoder = msgspec.msgpack.Encoder()
        self._in = bytearray()
        self._fds: deque[int] = deque()
        self._out: deque[tuple[memoryview, list[int]]] = deque()
        self.pinged = False  # and the peer has not answered yet
        self.heard = False  # something has come, if only the answer to a ping
        with contextlib.suppress(OSError):  # larger buffers keep a step in one write
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 21)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 21)
        sock.setblocking(False)

    @classmethod
    def from_fd(cls, fd: int, incoming: object) -> Link[T]:
        """The link on an inherited descriptor."""
        return cls(socket.socket(fileno=fd), incoming)

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: msgspec.Struct, fds: list[int] | None = None) -> None:
        """Sends or queues `message`; `fds` are duplicated at once, so the caller may close its own.

        LinkClosed if the peer is gone; OSError, with nothing sent, if this process has too many
        descriptors open.
        """
        body = self._encoder.encode(message)
        copies = _duplicates(fds or [])
        self._out.append((memoryview(_HEAD.pack(len(body), len(copies)) + body), copies))
        self.flush()

    def ping(self) -> None:
        """Asks for an answer, which resets `pinged` as soon as the peer and then we receive.
        LinkClosed if the peer is gone."""
        self.pinged = True
        self._out.append((memoryview(_HEAD.pack(0, _PING)), []))
        self.flush()

    @property
    def backlog(self) -> bool:
        """True while something waits for the socket to take it (call `flush` when writable)."""
        return bool(self._out)

    def flush(self) -> None:
        """Writes as much as the socket takes now. LinkClosed if the peer is gone."""
        while self._out:
            data, fds = self._out[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                sent = self.sock.sendmsg([data], rights)
            except BlockingIOError:
                return
            except OSError as error:
                raise LinkClosed(str(error)) from error
            for fd in fds:
                os.close(fd)
            if sent == len(data):
                self._out.popleft()
            else:
                self._out[0] = (data[sent:], [])

    def receive(self) -> list[tuple[T, list[int]]]:
        """Every whole message that has arrived, without waiting. LinkClosed at end-of-file."""
        got: list[tuple[T, list[int]]] = []
        while True:
            try:
                data, ancillary, _, _ = self.sock.recvmsg(_CHUNK, socket.CMSG_SPACE(4 * _MAX_FDS))
            except BlockingIOError:
                return got
            except OSError as error:
                raise LinkClosed(str(error)) from error
            if not data:
                if got:
                    return got  # the next call reports the end
                raise LinkClosed("end of file")
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds = array.array("i")
                    fds.frombytes(payload[: len(payload) - len(payload) % 4])
                    self._fds.extend(fds)
            self._in += data
            got.extend(self._whole())
            if len(data) < _CHUNK:
                return got

    def _whole(self) -> list[tuple[T, list[int]]]:
        got: list[tuple[T, list[int]]] = []
        at = 0
        while len(self._in) - at >= _HEAD.size:
            size, count = _HEAD.unpack_from(self._in, at)
            self.heard = True
            if not size:
                self._pinged(count)
                at += _HEAD.size
                continue
            end = at + _HEAD.size + size
            if len(self._in) < end:
                break
            if len(self._fds) < count:  # the kernel drops what a full descriptor table cannot take
                raise LinkClosed("descriptors were lost: this process has too many open")
            body = bytes(self._in[at + _HEAD.size : end])
            got.append((self._decoder.decode(body), [self._fds.popleft() for _ in range(count)]))
            at = end
        if at:
            del self._in[:at]
        return got

    def _pinged(self, what: int) -> None:
        if what == _PONG:
            self.pinged = False
            return
        self._out.append((memoryview(_HEAD.pack(0, _PONG)), []))
        with contextlib.suppress(LinkClosed):  # reading reports it
            self.flush()

    def close(self) -> None:
        """What was queued and not sent is dropped."""
        self.sock.close()
        for _, fds in self._out:
            self._fds.extend(fds)
        self._out.clear()
        while self._fds:
            os.close(self._fds.popleft())


def _duplicates(fds: list[int]) -> list[int]:
    """All of them or, with an OSError, none."""
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(os.dup(fd))
    except OSError:
        for fd in copies:
            os.close(fd)
        raise
    return copies
