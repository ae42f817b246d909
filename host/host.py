"""The host's own state: what runs, what waits, who asked; and what each message does to it."""

from __future__ import annotations

import asyncio
import resource
import select
import time
from collections import deque
from typing import Final, Protocol

import msgspec
from msgspec import Struct

from piehost.wire import client as wire
from piehost.wire import control, launch, step
from piehost.wire.client import EXIT_NOT_FOUND, Failed, HostToClient, Progress, Reason

from . import allotment, programs, quotas, rundir
from .clients import Client, Clients
from .core import Core
from .errors import HostError, Refused, exit_code_of
from .launchers import Launchers
from .options import Options
from .sandbox.failure import CONTROLS
from .seats import Seat

_SHUTDOWN_SECONDS: Final = 5.0  # at most, to see the inferlets dead
# of file descriptors: the host's own, with clients and ready rings; and at most for each inferlet
_OWN_DESCRIPTORS: Final = 128
_SEAT_DESCRIPTORS: Final = 8
_HOST_ENDED: Final = Reason(
    code="host_ended", what="piehost is shutting down", why="the server was told to stop"
)


_TOO_MUCH_INPUT: Final = Reason(
    code="input",
    what="the inferlet was sent more than it can hold",
    why=f"messages hold at most {wire.MAX_INPUT_BYTES} octets, and {wire.MAX_UNREAD_BYTES} together"
    " while it has not received them",
    hint="send less ahead of its `receive`",
)


class Observer(Protocol):
    """Who watches the host start."""

    def loading(self, progress: Progress) -> None: ...

    def ready(self, ready: step.Ready) -> None: ...


class Waiting(Struct, eq=False):
    """A launch that waits for the model or for a ring."""

    client: Client
    message: wire.Launch
    program: programs.Program
    input: list[wire.Input | wire.CloseInput]
    untaken: int = 0  # the weight of `input`


class Host:
    """Made and used inside a running event loop. After `ended`, call `close`."""

    def __init__(self, claim: rundir.Claim, options: Options, observer: Observer) -> None:
        self.ended = asyncio.Event()
        self.failure: Reason | None = None  # no launch will ever work
        self._options = options
        self._observer = observer
        self._ceilings = {
            key: quotas.parse_value(key, value, "serve --quota")
            for key, value in options.quotas.items()
        }
        self._seats: dict[int, Seat] = {}
        self._client_of: dict[int, Client] = {}  # by seat
        self._launched: dict[tuple[bytes, int], Seat | Waiting] = {}  # by client and request
        self._waiting: deque[Waiting] = deque()
        self._questions: dict[int, tuple[Client, wire.List | wire.AskStats]] = {}
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = max(1, (descriptors - _OWN_DESCRIPTORS) // _SEAT_DESCRIPTORS)
        self._launches = 0
        self._asked = 0
        self._clients = Clients(claim.socket, self)
        self._launchers = Launchers(self)
        self._core = Core(options, self)

    # --- launches ------------------------------------------------------------------------------

    def _launch(self, client: Client, message: wire.Launch) -> None:
        key = (client.identity, message.request)
        try:
            if self.failure is not None:
                raise _error(self.failure)
            if key in self._launched or client.muted:
                raise HostError("this launch cannot be told from another", code="bad_message")
            if len(self._launched) >= self._most:
                raise HostError(
                    f"{self._most} inferlets run or wait already",
                    "the server has file descriptors for no more",
                    "wait for some to end, or start the server under a higher `ulimit -n`",
                    "too_many",
                )
            _check(message)
            program = programs.resolve(message.program)
        except HostError as error:
            self._fail(client, message.request, error)
            return
        waiting = Waiting(client, message, program, [])
        self._launched[key] = waiting
        self._waiting.append(waiting)
        if self._core.progress is not None:
            self._clients.send(client, self._core.progress)
        self._start_waiting()

    def _start_waiting(self) -> None:
        """Starts launches in the order they came, as long as there are rings."""
        while self._waiting and (ready := self._core.ready) is not None:
            waiting = self._waiting[0]
            try:
                quota = allotment.resolve(
                    waiting.program.kind,
                    ready.model,
                    ready.pages,
                    self._ceilings,
                    waiting.program.quota,
                    waiting.message.quotas,
                )
            except HostError as error:
                self._waiting.popleft()
                self._drop_waiting(waiting, error)
                continue
            ring = self._core.take_ring(quota.limits.ring_bytes, len(self._waiting) - 1)
            if ring is None:
                return
            self._waiting.popleft()
            seat = Seat(
                self,
                ring,
                waiting.program,
                quota,
                waiting.client.pid,
                waiting.message.request,
                self._core.restarts,
            )
            self._start(seat, waiting, ready)

    def _start(self, seat: Seat, waiting: Waiting, ready: step.Ready) -> None:
        self._launches += 1
        self._seats[seat.number] = seat
        self._client_of[seat.number] = waiting.client
        self._launched[waiting.client.identity, waiting.message.request] = seat
        try:
            seat.start(
                waiting.message.args,
                waiting.message.waived,
                ready.model,
                self._core.vocabulary,
                self._core.controller.send,
                self._launchers.spawn,
            )
        except OSError as error:
            seat.spawn_failed(
                launch.SpawnFailed(
                    seat=seat.number,
                    stage="descriptors",
                    errno=error.errno or 0,
                    message=error.strerror or str(error),
                    hint="fewer inferlets at once, or a higher `ulimit -n` for the server",
                )
            )
            return
        for message in waiting.input:
            self._input(seat, message)

    def _drop_waiting(self, waiting: Waiting, error: HostError) -> None:
        del self._launched[waiting.client.identity, waiting.message.request]
        self._fail(waiting.client, waiting.message.request, error)

    def _fail(self, client: Client, request: int, error: HostError) -> None:
        answer = Failed(request=request, code=exit_code_of(error), reason=error.reason)
        self._clients.send(client, answer)

    # --- clients -------------------------------------------------------------------------------

    def from_client(self, client: Client, message: wire.ClientToHost) -> None:
        match message:
            case wire.Launch():
                self._launch(client, message)
            case wire.Input() | wire.CloseInput():
                launched = self._launched.get((client.identity, message.request))
                if launched is not None:
                    self._input(launched, message)
            case wire.Cancel():
                reason = Reason(code="cancelled", what="the client ended it")
                self._end(self._launched.get((client.identity, message.request)), reason)
            case wire.Stop():
                self._stop(client, message)
            case wire.List() | wire.AskStats():
                self._ask(client, message)
            case wire.Models():
                self._clients.send(client, self._model_list(message.request))
            case wire.Shutdown():
                self.ended.set()

    def client_gone(self, client: Client, reason: Reason) -> None:
        for (identity, _), launched in list(self._launched.items()):
            if identity == client.identity:
                self._end(launched, reason)

    def _input(self, launched: Seat | Waiting, message: wire.Input | wire.CloseInput) -> None:
        if isinstance(message, wire.Input):
            launched.untaken += wire.weight(message.data)
            if launched.untaken > wire.MAX_UNREAD_BYTES or len(message.data) > wire.MAX_INPUT_BYTES:
                self._end(launched, _TOO_MUCH_INPUT)
                return
        if isinstance(launched, Waiting):
            launched.input.append(message)
        elif isinstance(message, wire.Input):
            self._core.controller.send(control.Deliver(seat=launched.number, data=message.data))
        else:
            self._core.controller.send(control.CloseInput(seat=launched.number))

    def _taken(self, seat: Seat, message: control.Taken) -> None:
        weight = message.size + message.messages * wire.MESSAGE_OVERHEAD
        seat.untaken -= weight
        self._tell(seat, wire.InputTaken(seat.request, weight))

    def _end(self, launched: Seat | Waiting | None, reason: Reason) -> None:
        if isinstance(launched, Seat):
            launched.end(reason)
        elif launched is not None:
            self._waiting.remove(launched)
            self._drop_waiting(launched, _error(reason))

    def _stop(self, client: Client, message: wire.Stop) -> None:
        chosen = [s for s in self._seats.values() if message.id in (None, s.id)]
        if message.id is not None and not chosen:
            reason = Reason(
                code="not_found",
                what=f"no inferlet {message.id} is running",
                hint="piehost ps lists them",
            )
            self._clients.send(client, Failed(message.request, EXIT_NOT_FOUND, reason))
            return
        stopped = Reason(code="stopped", what="stopped by `piehost stop`")
        for seat in chosen:
            seat.end(stopped)
        if message.id is None:
            for waiting in list(self._waiting):
                self._end(waiting, stopped)
        self._clients.send(client, wire.Stopped(message.request, [s.id for s in chosen]))

    def _ask(self, client: Client, message: wire.List | wire.AskStats) -> None:
        self._asked += 1
        self._questions[self._asked] = (client, message)
        if self._core.ready is None:
            self._answer(control.Stats(self._asked, control.ControllerStats(), {}))
        else:
            self._core.controller.send(control.AskStats(request=self._asked))

    def _answer(self, stats: control.Stats) -> None:
        client, question = self._questions.pop(stats.request)
        answer: HostToClient
        if isinstance(question, wire.List):
            seats = [seat.info(stats.seats.get(n)) for n, seat in self._seats.items()]
            answer = wire.Listing(question.request, seats)
        else:
            answer = wire.HostStats(
                request=question.request,
                controller=stats.total,
                seats={self._seats[n].id: s for n, s in stats.seats.items() if n in self._seats},
                children=self._core.children() | self._launchers.children(),
                launches=self._launches,
                restarts=self._core.restarts + self._launchers.restarts,
                rings_ready=self._core.rings.ready if self._core.rings else 0,
            )
        self._clients.send(client, answer)

    def _model_list(self, request: int) -> wire.ModelList:
        ready = self._core.ready
        return wire.ModelList(
            request=request,
            options=self._options.as_text(),
            model=msgspec.to_builtins(ready.model) if ready else None,
            device=ready.device if ready else "",
            engine=ready.engine if ready else "",
            pages=ready.pages if ready else 0,
            load_seconds=ready.load_seconds if ready else 0.0,
        )

    # --- controller and backend ----------------------------------------------------------------

    def from_controller(self, message: control.ControllerToHost) -> None:
        match message:
            case control.Sent():
                if (seat := self._seats.get(message.seat)) is not None:
                    self._tell(seat, wire.Message(seat.request, message.data))
            case control.Taken():
                if (seat := self._seats.get(message.seat)) is not None:
                    self._taken(seat, message)
            case control.Released():
                if (seat := self._seats.get(message.seat)) is not None:
                    seat.released(message.stats)
            case control.End():
                if (seat := self._seats.get(message.seat)) is not None:
                    why = f"the controller ended it: {message.code}"
                    seat.end(
                        Reason(code=message.code, what=message.message, why=why, hint=message.hint)
                    )
            case control.Stats():
                self._answer(message)

    def core_progress(self, progress: Progress) -> None:
        self._observer.loading(progress)
        for client in {waiting.client for waiting in self._waiting}:
            self._clients.send(client, progress)

    def core_loaded(self, ready: step.Ready) -> None:
        self._observer.ready(ready)

    def core_rings(self) -> None:
        self._start_waiting()

    def core_lost(self, reason: Reason) -> None:
        for seat in list(self._seats.values()):
            seat.end(reason)
            seat.released(None)
        for number in list(self._questions):
            self._answer(control.Stats(number, control.ControllerStats(), {}))

    def core_failed(self, reason: Reason) -> None:
        self.core_lost(reason)
        self._failed(reason)

    def _failed(self, reason: Reason) -> None:
        self.failure = reason
        for waiting in self._waiting:
            self._drop_waiting(waiting, _error(reason))
        self._waiting.clear()
        self.ended.set()

    # --- launchers and seats -------------------------------------------------------------------

    def from_launcher(self, message: launch.LauncherToHost, fds: list[int]) -> None:
        seat = self._seats[message.seat]
        match message:
            case launch.Spawned():
                seat.spawned(message.pid, fds[0])
                self._tell(seat, wire.Started(seat.request, seat.id, message.pid))
                for held in seat.held:
                    self._tell(seat, held)
                seat.held.clear()
            case launch.SpawnFailed():
                seat.spawn_failed(message)
            case launch.Exited():
                seat.exited(message)

    def launcher_lost(self, kind: str, reason: Reason) -> None:
        for seat in [s for s in self._seats.values() if s.program.kind == kind]:
            seat.launcher_lost(reason)

    def launcher_failed(self, kind: str, reason: Reason) -> None:
        self.launcher_lost(kind, reason)
        self._failed(reason)

    def seat_output(self, seat: Seat, stream: int, data: bytes) -> None:
        self._tell(seat, wire.Output(seat.request, stream, data))

    def _tell(self, seat: Seat, message: HostToClient) -> None:
        """What comes before `Started` waits for it: launcher and controller are not in step."""
        if seat.pid:
            self._clients.send(self._client_of[seat.number], message)
        else:
            seat.held.append(message)

    def seat_dead(self, seat: Seat) -> None:
        if seat.admitted and self._is_current(seat):
            self._core.controller.send(control.Release(seat=seat.number))
        else:
            seat.released(None)

    def seat_done(self, seat: Seat) -> None:
        if self._is_current(seat):
            self._core.drop_ring(seat.number)
        client = self._client_of.pop(seat.number)
        del self._seats[seat.number]
        del self._launched[client.identity, seat.request]
        self._clients.send(client, seat.result())

    def _is_current(self, seat: Seat) -> bool:
        return seat.generation == self._core.restarts and self._core.ready is not None

    # --- end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends every process and connection; returns when they are gone."""
        reason = self.failure or _HOST_ENDED
        for waiting in self._waiting:
            self._drop_waiting(waiting, _error(reason))
        poll = select.poll()
        alive = set()
        for seat in self._seats.values():
            seat.end(reason)
            if seat.pidfd >= 0:
                alive.add(seat.pidfd)
                poll.register(seat.pidfd, select.POLLIN)
        deadline = time.monotonic() + _SHUTDOWN_SECONDS
        while alive and (left := deadline - time.monotonic()) > 0:
            for fd, _ in poll.poll(left * 1000):
                poll.unregister(fd)
                alive.discard(fd)
        for seat in list(self._seats.values()):
            seat.released(None)
            seat.launcher_lost(reason)  # its exit will not be reported any more
        self._launchers.close()
        self._core.close()
        self._clients.close()


def _check(message: wire.Launch) -> None:
    """Refused if it asks for something there cannot be."""
    for argument in message.args:
        if "\0" in argument:  # C programs would see only what is before it
            raise Refused(f"the argument {argument!r} holds a null character", code="bad_argument")
    for name in message.waived:
        if name not in CONTROLS:
            raise Refused(
                f"there is no sandbox control {name!r} to give up",
                hint=f"--allow-degraded {' or '.join(CONTROLS)}",
                code="bad_argument",
            )


def _error(reason: Reason) -> HostError:
    return HostError(reason.what, reason.why, reason.hint, reason.code)
