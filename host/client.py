"""A client of a host: launch programs, follow them, ask what runs. Used by the CLI, tests, bench.

    with connect() as client:
        run = client.launch("/path/to/program.py", ["--prompt", "Hi"])
        print(run.result().text)

One thread at a time; any number of runs at once. Whatever waits receives for all of them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec
import zmq

from piehost.wire import client as wire
from piehost.wire.client import HostToClient, Progress

from .client_run import Result, Run
from .errors import FailedAnswer, HostError, Refused
from .process_use import process_use
from .rundir import lock_owner, server_socket

__all__ = ["Client", "Result", "Run", "connect"]

T = TypeVar("T")
_RECONNECT_MS = 5  # an ephemeral host is connected to before it listens
_LINGER_MS = 200
_ALIVE = 0  # the request whose answer says only that the host lives
_LAST_WORDS_MS = 100
_ASK_SECONDS = 30.0
# while nothing comes, one looks after the host: whether it is stopped, then whether it answers
_LOOK_SECONDS = 1.0
_STOPPED_LOOKS = 5  # in a row; it may be a terminal's Ctrl-Z that is taken back at once
_SILENT_LOOKS = 10  # before it is asked, and then has _ASK_SECONDS


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
        self._host_pid = host_pid
        self._stopped_looks = 0
        self._silent_looks = 0
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
        return self.listing().inferlets

    def listing(self, ended: bool = False) -> wire.Listing:
        """What runs; with `ended`, the last that ended too."""
        number = self._number()
        return self._ask(wire.List(number, ended), number, wire.Listing)

    def inspect(self, inferlet: str) -> wire.Inspected:
        """All about the inferlet with this id, also if it is one of the last that ended.
        FailedAnswer if there is none."""
        number = self._number()
        return self._ask(wire.Inspect(number, inferlet), number, wire.Inspected)

    def set_quota(self, inferlet: str, quotas: dict[str, str]) -> wire.QuotaIsSet:
        """Changes quotas of a running inferlet, all or none. FailedAnswer says why not."""
        number = self._number()
        return self._ask(wire.SetQuota(number, inferlet, quotas), number, wire.QuotaIsSet)

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

    # --- receiving -----------------------------------------------------------------------------

    def pump(self, timeout: float | None = None, also: Sequence[int] = ()) -> list[int]:
        """Receives what has come, after waiting for something (`timeout` seconds, None for ever).

        Returns those of the descriptors `also` that can be read. HostError if the host died, is
        stopped by a signal, or does not answer.
        """
        poller = zmq.Poller()
        poller.register(self._dealer, zmq.POLLIN)
        for fd in (self._pidfd, *also):
            poller.register(fd, zmq.POLLIN)
        left = math.inf if timeout is None else max(0.0, timeout)
        while True:
            wait = min(left, _LOOK_SECONDS)
            ready = {what for what, _ in poller.poll(int(wait * 1000 + 0.999))}
            left -= wait
            if ready or left <= 0:
                break
            self._look_after_host()
        received = self._receive()
        if self._pidfd in ready and not received:
            self._dealer.poll(_LAST_WORDS_MS)  # ZeroMQ may still be reading what it wrote
            received = self._receive()
        if self._pidfd in ready and not received:
            raise _host_lost()
        return [fd for fd in also if fd in ready]

    def _look_after_host(self) -> None:
        """Nothing has come for another _LOOK_SECONDS."""
        self._check_stopped()
        self._silent_looks += 1
        if self._silent_looks == _SILENT_LOOKS:
            self.say(wire.Models(_ALIVE))
        elif (self._silent_looks - _SILENT_LOOKS) * _LOOK_SECONDS >= _ASK_SECONDS:
            raise _no_answer()

    def _check_stopped(self) -> None:
        stopped = process_use(self._host_pid).state == "T"
        self._stopped_looks = self._stopped_looks + 1 if stopped else 0
        if self._stopped_looks >= _STOPPED_LOOKS:
            raise HostError(
                f"the host, process {self._host_pid}, is stopped",
                "a signal such as SIGSTOP or a terminal's Ctrl-Z stopped it; nothing it runs is"
                " served until it goes on",
                f"kill -CONT {self._host_pid}",
                "host_stopped",
            )

    def _receive(self) -> bool:
        received = False
        while True:
            try:
                body = self._dealer.recv(zmq.NOBLOCK)
            except zmq.Again:
                return received
            received = True
            self._silent_looks = self._stopped_looks = 0
            self._dispatch(self._decoder.decode(body))

    def _dispatch(self, message: HostToClient) -> None:
        if isinstance(message, Progress):
            self.progress = message
            return
        if isinstance(message, wire.Failed) and not message.request:
            raise FailedAnswer(message.code, message.reason)  # it did not understand us
        run = self._runs.get(message.request)
        if message.request == _ALIVE:
            return
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
                raise _no_answer()
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
    client = Client(path, pid)
    if lock_owner(path) != pid:  # it died just then, and the process may be another by now
        client.close()
        raise _host_lost()
    return client


def _no_answer() -> HostError:
    return HostError(
        "the host does not answer",
        f"it said nothing for {_ASK_SECONDS:.0f} seconds",
        "look at its output, or stop it",
        "no_answer",
    )


def _host_lost() -> HostError:
    return HostError(
        "the host process died",
        "it crashed or was killed; what it ran is ended",
        "run again; with --debug you see what it printed",
        "host_lost",
    )
