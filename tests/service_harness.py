"""A real store or egress broker for tests: the test plays the host over a real socketpair."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from inferlet.errors import from_answer

from piehost.wire.link import Link
from piehost.wire.services import (
    EgressUsed,
    Gone,
    Grant,
    HttpCall,
    ServiceAsk,
    ServiceToHost,
    StoreCall,
)

PATIENCE = 30.0  # seconds; a test waits this long only if it is about to fail


class Service:
    """`python -m MODULE --fd N OPTIONS`."""

    def __init__(
        self,
        module: str,
        *options: str,
        env: dict[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        """`prepare` runs in the child before the program."""
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--fd", str(theirs.fileno()), *options],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **(env or {})},
            preexec_fn=prepare,
            stderr=subprocess.PIPE,
        )
        theirs.close()
        self.link: Link[Any] = Link(ours, ServiceToHost)
        self._replies: dict[int, Any] = {}
        self._requests = 0
        self.used: dict[int, int] = {}  # octets reported, by seat
        self.order: list[int] = []  # requests as they were answered
        self.seats_gone: set[int] = set()  # of which no more will be said

    def grant(self, seat: int = 1, **fields: Any) -> None:
        merged = {
            "user": "someone",
            "egress": [],
            "store_bytes": 1 << 20,
            "egress_bytes": 1 << 20,
            "egress_seconds": 20.0,
            **fields,
        }
        self.link.send(Grant(seat, **merged))

    def gone(self, seat: int = 1) -> None:
        self.link.send(Gone(seat))

    def send(self, call: StoreCall | HttpCall, seat: int = 1) -> int:
        """The number to wait for."""
        self._requests += 1
        self.link.send(ServiceAsk(seat, self._requests, call))
        return self._requests

    def wait(self, request: int) -> Any:
        """The answer's value; an error answer is raised as the inferlet would see it."""
        while request not in self._replies:
            assert self.receive(PATIENCE), f"no answer to request {request}"
        reply = self._replies.pop(request)
        if reply.error is not None:
            code, message, hint = reply.error
            assert message, "an error says what and why"
            raise from_answer(code, message, hint)
        return reply.value

    def ask(self, call: StoreCall | HttpCall, seat: int = 1) -> Any:
        return self.wait(self.send(call, seat))

    def answered(self, request: int) -> bool:
        return request in self._replies

    def receive(self, timeout: float) -> bool:
        """Whether anything came. Fails if the process has ended."""
        if self.link.backlog:
            self.link.flush()
        if not select.select([self.link.fileno()], [], [], timeout)[0]:
            return False
        for message, _ in self.link.receive():
            if isinstance(message, EgressUsed):
                assert message.seat not in self.seats_gone, "it was said that there is no more"
                self.used[message.seat] = self.used.get(message.seat, 0) + message.octets
            elif isinstance(message, Gone):
                self.seats_gone.add(message.seat)
            else:
                assert message.request not in self._replies, "one answer a request"
                self._replies[message.request] = message
                self.order.append(message.request)
        return True

    def kill(self) -> None:
        """As a crash would: nothing of it runs on."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE)

    def close(self) -> str:
        """Ends it as the host does, which it must survive; what it wrote to its log."""
        killed = self.process.returncode is not None
        self.link.close()
        _, log = self.process.communicate(timeout=PATIENCE)
        assert killed or self.process.returncode == 0, log.decode()
        assert b"Traceback" not in log, log.decode()
        return log.decode()

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.process.kill()
            self.link.close()
            sys.stderr.write(self.process.communicate()[1].decode())
