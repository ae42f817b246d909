"""A client of a host: launch programs, follow them, ask what runs. Used by the CLI, tests, bench.

    with connect() as client:
        run = client.launch("/path/to/program.py", ["--prompt", "Hi"])
        print(run.result().text)

One thread at a time; any number of runs at once. Whatever waits receives for all of them.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec
import zmq

from piehost.wire import client as wire
from piehost.wire.client import HostToClient, Progress
from piehost.wire.stats import SeatStats

from .errors import FailedAnswer, HostError, Refused
from .rundir import lock_owner, server_socket

T = TypeVar("T")
_RECONNECT_MS = 5  # an ephemeral host is connected to before it listens
_LINGER_MS = 200
_LAST_WORDS_MS = 100
_ASK_SECONDS = 30.0

RunEvent = wire.Started | wire.Message | wire.Output | wire.Ended


class Result(msgspec.Struct, kw_only=True):
    """All of a finished run. `code` is the inferlet's exit code, or 128 + signal, or 125."""

    id: str
    code: int
    reason: wire.Reason | None
    messages: list[bytes]
    stdout: bytes
    stderr: bytes
    stats: SeatStats
    usage: wire.Usage | None

    @property
    def text(self) -> str:
        """The messages, joined."""
        return b"".join(self.messages).decode(errors="replace")


class Run:
    """One launched inferlet. `id` and `pid` are known once it has started."""

    def __init__(self, client: Client, request: int) -> None:
        self.id = ""
        self.pid = 0
        self._client = client
        self._request = request
        self._events: deque[RunEvent] = deque()
        self._failed: wire.Failed | None = None
        self.over = False
        self.untaken = 0  # the weight of what was sent and it has not received yet

    def send(self, data: bytes) -> None:
        """A message for its `receive`. Refused if it is longer than 60,000 octets."""
        if len(data) > wire.MAX_INPUT_BYTES:
            raise Refused(
                f"a message of {len(data)} octets is too long",
                f"a message holds at most {wire.MAX_INPUT_BYTES} octets",
                "send it in parts",
                "input_too_long",
            )
        self.untaken += wire.weight(data)
        self._client.say(wire.Input(self._request, data))

    def close_input(self) -> None:
        """`receive` fails with `closed` once everything sent is read."""
        self._client.say(wire.CloseInput(self._request))

    def cancel(self) -> None:
        """Ends it; `Ended` follows."""
        self._client.say(wire.Cancel(self._request))

    def take(self) -> list[RunEvent]:
        """The events that have come, without waiting. FailedAnswer if the launch failed."""
        if self._failed is not None:
            raise FailedAnswer(self._failed.code, self._failed.reason)
        events = list(self._events)
        self._events.clear()
        return events

    def events(self) -> Iterator[RunEvent]:
        """Every event up to `Ended`, waiting for them.

        FailedAnswer if it could not be launched; HostError if the host died.
        """
        while True:
            for event in self.take():
                yield event
                if isinstance(event, wire.Ended):
                    return
            if self.over and not self._events and self._failed is None:
                return
            if not self._events:
                self._client.pump()

    def result(self, timeout: float | None = None) -> Result:
        """Waits for the end. TimeoutError after `timeout` seconds; else as `events`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        messages: list[bytes] = []
        output = {1: bytearray(), 2: bytearray()}
        while True:
            for event in self.take():
                match event:
                    case wire.Message():
                        messages.append(event.data)
                    case wire.Output():
                        output[event.stream] += event.data
                    case wire.Ended():
                        return Result(
                            id=self.id,
                            code=event.code,
                            reason=event.reason,
                            messages=messages,
                            stdout=bytes(output[1]),
                            stderr=bytes(output[2]),
                            stats=event.stats,
                            usage=event.usage,
                        )
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"{self.id or 'the launch'} has not ended")
            self._client.pump(left)

    def received(self, message: HostToClient) -> None:
        """For the client: an event of this run."""
        match message:
            case wire.Started():
                self.id, self.pid = message.id, message.pid
                self._events.append(message)
            case wire.Message() | wire.Output():
                self._events.append(message)
            case wire.InputTaken():
                self.untaken -= message.weight
            case wire.Ended():
                self.over = True
                self._events.append(message)
            case wire.Failed():
                self.over = True
                self._failed = message


class Client:
    """A connection to the host that listens at `socket`, which is process `host_pid`."""

    def __init__(self, socket: Path, host_pid: int) -> None:
        self.progress: Progress | None = None  # the latest, while a launch waits for the model
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(HostToClient)
        self._runs: dict[int, Run] = {}
        self._answers: dict[int, HostToClient] = {}
        self._next_request = 1
        self._read = 0
        try:
            self._pidfd = os.pidfd_open(host_pid)
        except OSError as error:
            raise _host_lost() from error
        self._context = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        self._dealer.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        self._dealer.setsockopt(zmq.LINGER, _LINGER_MS)
        self._dealer.connect(f"ipc://{socket}")
        self.say(wire.Hello(os.getpid()))

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends what this client launched and still runs."""
        if self._pidfd < 0:
            return
        self.say(wire.Bye())
        self._dealer.close()
        self._context.term()
        os.close(self._pidfd)
        self._pidfd = -1

    # --- launches ------------------------------------------------------------------------------

    def launch(
        self,
        program: str | os.PathLike[str],
        args: Sequence[str] = (),
        quotas: dict[str, str] | None = None,
        waived: Sequence[str] = (),
        *,
        user: str = "",
        job: str = "",
        egress: Sequence[str] = (),
        record: str | os.PathLike[str] = "",
        weather: str = "",
    ) -> Run:
        """Asks for `program`; returns at once. The options as in `piehost launch`; `weather` is one
        of `conform/weathers.py`."""
        run = Run(self, self._number())
        self._runs[run._request] = run
        path = str(Path(program).absolute())
        self.say(
            wire.Launch(
                request=run._request,
                program=path,
                args=list(args),
                quotas=quotas or {},
                waived=list(waived),
                egress=list(egress),
                user=user,
                job=job,
                record=str(Path(record).absolute()) if record else "",
                weather=weather,
            )
        )
        return run

    # --- questions -----------------------------------------------------------------------------

    def inferlets(self) -> list[wire.InferletInfo]:
        number = self._number()
        return self._ask(wire.List(number), number, wire.Listing).inferlets

    def models(self) -> wire.ModelList:
        number = self._number()
        return self._ask(wire.Models(number), number, wire.ModelList)

    def stats(self) -> wire.HostStats:
        number = self._number()
        return self._ask(wire.AskStats(number), number, wire.HostStats)

    def stop(self, inferlet: str | None) -> list[str]:
        """Ends the inferlet with this id, or all. FailedAnswer if there is none of that id."""
        number = self._number()
        return self._ask(wire.Stop(number, inferlet), number, wire.Stopped).ids

    def shutdown(self) -> None:
        """Asks the host to end; returns when it has. TimeoutError if it does not."""
        self.say(wire.Shutdown())
        if not select.select([self._pidfd], [], [], _ASK_SECONDS)[0]:
            raise TimeoutError("the host has not ended")

    # --- receiving -----------------------------------------------------------------------------

    def pump(self, timeout: float | None = None, also: Sequence[int] = ()) -> list[int]:
        """Receives what has come, after waiting for something (`timeout` seconds, None for ever).

        Returns those of the descriptors `also` that can be read. HostError if the host died.
        """
        poller = zmq.Poller()
        poller.register(self._dealer, zmq.POLLIN)
        for fd in (self._pidfd, *also):
            poller.register(fd, zmq.POLLIN)
        wait_ms = None if timeout is None else max(0, int(timeout * 1000 + 0.999))
        ready = {what for what, _ in poller.poll(wait_ms)}
        received = self._receive()
        if self._pidfd in ready and not received:
            self._dealer.poll(_LAST_WORDS_MS)  # ZeroMQ may still be reading what it wrote
            received = self._receive()
        if self._pidfd in ready and not received:
            raise _host_lost()
        return [fd for fd in also if fd in ready]

    def _receive(self) -> bool:
        received = False
        while True:
            try:
                body = self._dealer.recv(zmq.NOBLOCK)
            except zmq.Again:
                return received
            received = True
            self._dispatch(self._decoder.decode(body))

    def _dispatch(self, message: HostToClient) -> None:
        if isinstance(message, Progress):
            self.progress = message
            return
        if isinstance(message, wire.Failed) and not message.request:
            raise FailedAnswer(message.code, message.reason)  # it did not understand us
        run = self._runs.get(message.request)
        if run is None:
            self._answers[message.request] = message
            return
        run.received(message)
        if isinstance(message, wire.Message | wire.Output):
            self._read += wire.weight(message.data)
            if self._read >= wire.ACK_BYTES:
                self.say(wire.Ack(self._read))
                self._read = 0
        elif run.over:
            del self._runs[message.request]

    def _ask(self, question: wire.ClientToHost, number: int, kind: type[T]) -> T:
        self.say(question)
        deadline = time.monotonic() + _ASK_SECONDS
        while (answer := self._answers.pop(number, None)) is None:
            if (left := deadline - time.monotonic()) <= 0:
                raise HostError(
                    "the host does not answer",
                    f"it said nothing for {_ASK_SECONDS:.0f} seconds",
                    "look at its output, or stop it",
                    "no_answer",
                )
            self.pump(left)
        if isinstance(answer, wire.Failed):
            raise FailedAnswer(answer.code, answer.reason)
        assert isinstance(answer, kind)
        return answer

    def say(self, message: wire.ClientToHost) -> None:
        """Sends `message`. Refused if it is too large, or holds text that is not Unicode."""
        try:
            body = self._encoder.encode(message)
        except UnicodeEncodeError as error:  # Python's stand-ins for octets of the command line
            raise Refused(
                f"{error.object!r} is not UTF-8",
                "names and arguments are text; octets of any other kind go as messages",
                "rename it, or send it by stdin",
                "not_utf8",
            ) from error
        if len(body) > wire.MAX_CLIENT_MESSAGE:
            raise Refused(
                "the arguments are too long",
                f"a launch holds at most {wire.MAX_CLIENT_MESSAGE} octets",
                "pass large inputs as messages",
                "too_large",
            )
        self._dealer.send(body)

    def _number(self) -> int:
        self._next_request += 1
        return self._next_request - 1


def connect(socket: str | None = None) -> Client:
    """A client of the running server: at `socket`, PIEHOST_SOCKET, or the run directory.

    HostError (code "no_server") if none runs.
    """
    path = server_socket(socket)
    pid = lock_owner(path)
    if pid is None:
        raise HostError(
            f"no server listens at {path}", hint="start one: piehost serve", code="no_server"
        )
    return Client(path, pid)


def _host_lost() -> HostError:
    return HostError(
        "the host process died",
        "it crashed or was killed; what it ran is ended",
        "run again; with --debug you see what it printed",
        "host_lost",
    )
