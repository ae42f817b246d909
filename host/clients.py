"""The ZeroMQ ROUTER that clients connect to: who they are, what they sent, whether they live."""

from __future__ import annotations

import asyncio
import os
import resource
import traceback
from pathlib import Path
from typing import Final, Protocol

import msgspec
import zmq

from piehost.wire.client import (
    EXIT_HOST,
    MAX_CLIENT_MESSAGE,
    MAX_UNREAD_BYTES,
    Ack,
    Bye,
    ClientToHost,
    Failed,
    Hello,
    HostToClient,
    Message,
    Output,
    Reason,
    weight,
)

_MAX_ARRIVED = 64  # messages handled at a time, before the host looks at anything else
# a client takes two descriptors, and ZeroMQ aborts the process if it has none for a connection
_DESCRIPTORS_PER_CLIENT = 8
_LINGER_MS = 500  # at the host's end, for the last answers to leave
_NO_MEMORY: Final = Reason(
    code="host_memory",
    what="the host cannot take this message",
    why="it has no memory for it",
    hint="send less, run fewer inferlets at once, or give the server more memory",
)


class Client:
    """A connected client."""

    def __init__(self, identity: bytes, pid: int, pidfd: int) -> None:
        self.identity = identity
        self.pid = pid
        self.pidfd = pidfd
        self.unread = 0  # octets of messages and output it has not acknowledged
        self.gone = False
        self.muted = False  # it gets no more messages and output: it did not read them


class ClientListener(Protocol):
    def from_client(self, client: Client, message: ClientToHost) -> None: ...

    def client_gone(self, client: Client, reason: Reason) -> None:
        """It died, said goodbye, or reads too slowly: what it launched is to be ended."""


class Clients:
    def __init__(self, socket: Path, listener: ClientListener) -> None:
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._by_identity: dict[bytes, Client] = {}
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = max(1, descriptors // _DESCRIPTORS_PER_CLIENT)
        self._decoder = msgspec.msgpack.Decoder(ClientToHost)
        self._encoder = msgspec.msgpack.Encoder()
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.SNDHWM, 0)  # bounded by MAX_UNREAD_BYTES instead
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to one that left is an error
        self._router.setsockopt(zmq.MAXMSGSIZE, MAX_CLIENT_MESSAGE)
        self._router.setsockopt(zmq.LINGER, _LINGER_MS)
        mask = os.umask(0o177)
        try:
            self._router.bind(f"ipc://{socket}")
        finally:
            os.umask(mask)
        self._fd: int = self._router.FD
        self._scheduled = False
        self._loop.add_reader(self._fd, self._drain)

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        for client in list(self._by_identity.values()):
            self._forget(client)
        self._router.close()
        self._context.term()

    def send(self, client: Client, message: HostToClient) -> None:
        if client.gone:
            return
        if isinstance(message, Message | Output):
            if client.muted:
                return
            client.unread += weight(message.data)
        try:
            self._router.send_multipart([client.identity, self._encoder.encode(message)])
        except zmq.ZMQError:  # its connection is closed
            reason = Reason(code="client_gone", what="the client disconnected")
            self._loop.call_soon(self._lose, client, reason)
        if client.unread > MAX_UNREAD_BYTES and not client.muted:
            client.muted = True
            reason = Reason(
                code="client_slow",
                what="the client did not read its messages",
                why=f"more than {MAX_UNREAD_BYTES} octets waited for it",
                hint="read faster, or send less",
            )
            self._loop.call_soon(self._listener.client_gone, client, reason)
        # ZeroMQ's descriptor is edge-triggered, and sending may have eaten the edge
        self._drain_soon()

    def _drain(self) -> None:
        self._scheduled = False
        for _ in range(_MAX_ARRIVED):
            if self._router.closed:  # a call may be scheduled when the host closes
                return
            try:  # not copied: there may be no memory for that, and then it would be lost
                sender, *parts = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
                self._hear(sender.bytes, [part.buffer for part in parts])
            except zmq.Again:
                return
            except MemoryError:  # not even for the refusal
                break
        self._drain_soon()

    def _hear(self, identity: bytes, parts: list[memoryview]) -> None:
        """Whatever goes wrong, other clients are heard all the same."""
        try:
            self._received(identity, parts[0] if len(parts) == 1 else b"".join(parts))
        except MemoryError:
            self._refuse(identity, _NO_MEMORY)
        except Exception:  # a fault of ours
            traceback.print_exc()
            self._complain(identity, "the host failed on it; its output says more")

    def _drain_soon(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._drain)

    def _received(self, identity: bytes, body: bytes | memoryview) -> None:
        client = self._by_identity.get(identity)
        try:
            message = self._decoder.decode(body)
        except msgspec.DecodeError as error:
            message = None
            why = str(error)
        if isinstance(message, Hello) and client is None:
            self._hello(identity, message.pid)
        elif message is None or client is None:
            self._complain(identity, "it said no Hello" if message else why)
        elif isinstance(message, Ack):
            client.unread = max(0, client.unread - message.size)
        elif isinstance(message, Bye):
            self._lose(client, Reason(code="client_gone", what="the client closed"))
        else:
            self._listener.from_client(client, message)

    def _hello(self, identity: bytes, pid: int) -> None:
        if len(self._by_identity) >= self._most:
            reason = Reason(
                code="too_many_clients",
                what=f"{self._most} clients are connected already",
                why="the server has file descriptors for no more",
                hint="close some, or start the server under a higher `ulimit -n`",
            )
            self._refuse(identity, reason)
            return
        try:
            pidfd = os.pidfd_open(pid)
        except (OSError, OverflowError) as error:
            self._complain(identity, f"process {pid}: {error}")
            return
        client = Client(identity, pid, pidfd)
        self._by_identity[identity] = client
        reason = Reason(code="client_gone", what="the client died")
        self._loop.add_reader(pidfd, self._lose, client, reason)

    def _complain(self, identity: bytes, why: str) -> None:
        reason = Reason(
            code="bad_message",
            what="the host cannot use this message",
            why=why,
            hint="use the client of the same piehost version",
        )
        self._refuse(identity, reason)

    def _refuse(self, identity: bytes, reason: Reason) -> None:
        stranger = Client(identity, 0, -1)
        self.send(stranger, Failed(request=0, code=EXIT_HOST, reason=reason))

    def _lose(self, client: Client, reason: Reason) -> None:
        if client.identity in self._by_identity:
            self._forget(client)
            self._listener.client_gone(client, reason)

    def _forget(self, client: Client) -> None:
        client.gone = True
        del self._by_identity[client.identity]
        self._loop.remove_reader(client.pidfd)
        os.close(client.pidfd)
