"""A real backend process for tests: the test plays host and controller over real socketpairs."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from typing import Any

from piehost.host.shm import create_ring, create_ring_in, seal_ring
from piehost.wire.link import Link
from piehost.wire.step import (
    AddRing,
    BackendToHost,
    LoadFailed,
    Progress,
    Ready,
    RingMapped,
    Step,
    StepDone,
)


class BackendProcess:
    """`python -m piehost.gpu_backend --model MODEL OPTIONS`."""

    def __init__(self, model: str, *options: str, env: dict[str, str] | None = None) -> None:
        host, host_end = socket.socketpair()
        controller, controller_end = socket.socketpair()
        ends = (host_end.fileno(), controller_end.fileno())
        links = ["--host-fd", str(ends[0]), "--controller-fd", str(ends[1])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "piehost.gpu_backend", "--model", model, *links, *options],
            pass_fds=ends,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
        )
        host_end.close()
        controller_end.close()
        self.host: Link[Any] = Link(host, BackendToHost)
        self.controller: Link[StepDone] = Link(controller, StepDone)
        self.progress: list[Progress] = []

    def started(self) -> tuple[Ready | LoadFailed, list[int]]:
        """Waits for the end of loading; the answer and its descriptors."""
        while True:
            for message, fds in self._arrived(self.host):
                if not isinstance(message, Progress):
                    return message, fds
                self.progress.append(message)

    def run(self, *steps: Step) -> list[StepDone]:
        """Sends all steps at once and waits for their answers."""
        for step in steps:
            self.controller.send(step)
        done: list[StepDone] = []
        while len(done) < len(steps):
            done += [message for message, _ in self._arrived(self.controller)]
        return done

    def add_ring(self, ring: int, size: int) -> int:
        """Rings as a host makes them: created, mapped by the backend, ring out sealed. Returns
        ring out; ring in takes no part where this is used."""
        fd = create_ring(f"ring-{ring}", size)
        into = create_ring_in(f"ring-in-{ring}", size)
        self.host.send(AddRing(ring, size, size), [fd, into])
        os.close(into)
        assert self._arrived(self.host) == [(RingMapped(ring), [])]
        seal_ring(fd)
        return fd

    def close(self) -> None:
        self.host.close()
        self.controller.close()
        self.process.wait(30)

    @staticmethod
    def _arrived(link: Link[Any]) -> list[tuple[Any, list[int]]]:
        ready, _, _ = select.select([link.fileno()], [], [], 60)
        assert ready, "the backend says nothing"
        return link.receive()
