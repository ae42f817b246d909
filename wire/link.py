"""A message link over an inherited stream socketpair, with file descriptors where needed.

On the wire: u32 body length, u8 number of descriptors, body (msgpack). End-of-file is `LinkClosed`:
that is how a process learns of its peer's death.
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

        LinkClosed if the peer is gone.
        """
        fds = [os.dup(fd) for fd in fds] if fds else []
        body = self._encoder.encode(message)
        self._out.append((memoryview(_HEAD.pack(len(body), len(fds)) + body), fds))
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

    def close(self) -> None:
        self.sock.close()
        while self._fds:
            os.close(self._fds.popleft())
