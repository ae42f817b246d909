"""The step server: answers the controller's steps in order, and the host's ring messages.

It ends when either link does: without a host or a controller there is nobody to serve.
"""

from __future__ import annotations

import os
import select
from collections import deque
from typing import Generic, Protocol, TypeVar

from piehost.host.shm import sealed_memfd
from piehost.wire.link import Link
from piehost.wire.step import (
    MAX_IN_FLIGHT,
    AddRing,
    DropRing,
    HostToBackend,
    Ready,
    RingMapped,
    Step,
    StepDone,
)

from .vocabulary import Vocabulary

P = TypeVar("P")  # a step on its way


class StepBackend(Protocol[P]):
    """What runs steps: a model on torch, or a scripted one."""

    @property
    def overlaps(self) -> bool:
        """Whether `submit` returns before the step has run."""

    def add_ring(self, ring: int, out_fd: int, size: int, in_fd: int, in_size: int) -> None:
        """Maps ring out for writing and ring in for reading; the descriptors may be closed
        afterwards. ValueError if one is not a ring of its size (octets)."""

    def drop_ring(self, ring: int) -> None: ...

    def submit(self, step: Step) -> P:
        """Starts a step."""

    def finish(self, pending: P) -> StepDone:
        """Waits for the step and says how it went."""


class Server(Generic[P]):
    """`backend` behind its two links."""

    def __init__(
        self, backend: StepBackend[P], host: Link[HostToBackend], controller: Link[Step]
    ) -> None:
        self._backend = backend
        self._host = host
        self._controller = controller
        self._steps: deque[Step] = deque()
        self._running: deque[P] = deque()
        self._poll = select.epoll()
        self._watched = {host.fileno(): select.EPOLLIN, controller.fileno(): select.EPOLLIN}
        for fd, events in self._watched.items():
            self._poll.register(fd, events)

    def serve(self, ready: Ready, vocabulary: Vocabulary) -> None:
        """Sends `ready`, with `vocabulary`, and serves until a link closes (LinkClosed)."""
        self._send_ready(ready, vocabulary)
        while True:
            self._receive(wait=not self._steps and not self._running)
            if self._steps:
                self._running.append(self._backend.submit(self._steps.popleft()))
                if self._backend.overlaps and len(self._running) < MAX_IN_FLIGHT:
                    continue  # the next step may be here already: start it before waiting
            if self._running:
                self._controller.send(self._backend.finish(self._running.popleft()))

    def _send_ready(self, ready: Ready, vocabulary: Vocabulary) -> None:
        fds = [
            sealed_memfd("vocabulary", vocabulary.table),
            sealed_memfd("tokenizer", vocabulary.tokenizer_json),
        ]
        self._host.send(ready, fds)
        for fd in fds:
            os.close(fd)

    def _receive(self, wait: bool) -> None:
        """Takes in what has arrived; with `wait`, at least one thing."""
        for link in (self._host, self._controller):
            events = select.EPOLLIN | (select.EPOLLOUT if link.backlog else 0)
            if self._watched[link.fileno()] != events:
                self._watched[link.fileno()] = events
                self._poll.modify(link.fileno(), events)
        for fd, events in self._poll.poll(-1 if wait else 0):
            if events & select.EPOLLOUT:
                (self._host if fd == self._host.fileno() else self._controller).flush()
            if events & ~select.EPOLLOUT:
                self._take(fd)

    def _take(self, fd: int) -> None:
        if fd == self._controller.fileno():
            self._steps.extend(step for step, _ in self._controller.receive())
            return
        for message, fds in self._host.receive():
            match message:
                case AddRing(ring, size, in_size):
                    self._backend.add_ring(ring, fds[0], size, fds[1], in_size)
                    for ring_fd in fds:
                        os.close(ring_fd)
                    self._host.send(RingMapped(ring))
                case DropRing(ring):
                    self._backend.drop_ring(ring)
