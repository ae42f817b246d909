"""The host's own state: who asked for what; and what each message does to it."""

from __future__ import annotations

import asyncio
import os
import pwd
from typing import Final, Protocol

from piehost.wire import client as wire
from piehost.wire import control, launch, step
from piehost.wire.client import Failed, Progress, Reason

from . import live_quota, programs, rundir
from .asks import Asks
from .cgroups import Detection
from .clients import Client, Clients
from .config import Settings
from .conform import weathers
from .core import Core
from .errors import HostError, Refused, exit_code_of
from .family import Family
from .launchers import Launchers
from .launches import Launches, Waiting
from .log import log
from .options import Options
from .owners import ClientOwner
from .questions import Questions, not_found
from .quotas import as_text
from .recording import Recorder
from .sandbox.failure import CONTROLS
from .services import Services
from .watchdog import Watchdog

_MAX_NAME_OCTETS: Final = 256  # of users and jobs
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


class Host:
    """Made and used inside a running event loop. After `ended`, call `close`."""

    def __init__(
        self, claim: rundir.Claim, options: Options, settings: Settings, observer: Observer
    ) -> None:
        self.ended = asyncio.Event()
        self.failure: Reason | None = None  # no launch will ever work
        self._settings = settings
        self._observer = observer
        self._user = _own_name()
        self._owners: dict[tuple[bytes, int], ClientOwner] = {}  # by client and request
        self._clients = Clients(claim.socket, self)
        self._groups = Detection(asyncio.get_running_loop().call_soon_threadsafe)
        self._launchers = Launchers(self)
        self._core = Core(options, self)
        self._services = Services()
        self._launches = Launches(
            self._core, self._launchers, settings, self._groups, self._services.gone
        )
        self._asks = Asks(self._launches, self._services)
        parts = (self._core, self._launchers, self._services)
        self._watchdog = Watchdog(lambda: [c for part in parts for c in part.processes()])
        self._questions = Questions(
            options, self._core, self._launchers, self._services, self._launches, self._clients
        )

    # --- clients -------------------------------------------------------------------------------

    def from_client(self, client: Client, message: wire.ClientToHost) -> None:
        match message:
            case wire.Launch():
                self._launch(client, message)
            case wire.Input() | wire.CloseInput():
                owner = self._owners.get((client.identity, message.request))
                if owner is not None:
                    self._input(owner, message)
            case wire.Cancel():
                owner = self._owners.get((client.identity, message.request))
                if owner is not None:
                    reason = Reason(code="cancelled", what="the client ended it")
                    self._launches.end(owner, reason)
            case wire.Stop():
                self._stop(client, message)
            case wire.SetQuota():
                self._set_quota(client, message)
            case wire.List() | wire.AskStats() | wire.Inspect():
                self._questions.ask(client, message)
            case wire.Models():
                self._questions.answer_models(client, message)

    def client_gone(self, client: Client, reason: Reason) -> None:
        for owner in list(self._owners.values()):
            if owner.client is client:
                self._launches.end(owner, reason)

    def _launch(self, client: Client, message: wire.Launch) -> None:
        key = (client.identity, message.request)
        try:
            if self.failure is not None:
                failure = self.failure
                raise HostError(failure.what, failure.why, failure.hint, failure.code)
            if key in self._owners or client.muted:
                raise HostError("this launch cannot be told from another", code="bad_message")
            self._launches.check_room()
            _check(message)
            program = programs.resolve(message.program)
            user = message.user or self._user
            self._settings.check_egress(message.egress, user, program.name)
            weather = weathers.make(message.weather) if message.weather else None
            recorder = Recorder(message.record) if message.record else None
        except HostError as error:
            answer = Failed(message.request, exit_code_of(error), error.reason)
            self._clients.send(client, answer)
            return

        def over() -> None:
            del self._owners[key]
            if recorder is not None:
                result = owner.seat.result(message.request) if owner.seat is not None else None
                recorder.close(result if isinstance(result, wire.Ended) else None)

        owner = ClientOwner(
            client,
            message.request,
            self._clients,
            lambda to_seat: self._core.controller.send(to_seat),
            over,
            recorder,
            weather,
        )
        self._owners[key] = owner
        if self._core.progress is not None:
            self._clients.send(client, self._core.progress)
        family = Family(
            user=user,
            program=program.name,
            job=message.job,
            egress=message.egress,
            waived=message.waived,
            manifest_quota=program.quota,
            launch_quota=message.quotas,
        )
        self._launches.add(Waiting(owner, program, message.args, family))

    def _input(self, owner: ClientOwner, message: wire.Input | wire.CloseInput) -> None:
        if isinstance(message, wire.Input):
            owner.untaken += wire.weight(message.data)
            if owner.untaken > wire.MAX_UNREAD_BYTES or len(message.data) > wire.MAX_INPUT_BYTES:
                self._launches.end(owner, _TOO_MUCH_INPUT)
                return
        owner.input(message)

    def _stop(self, client: Client, message: wire.Stop) -> None:
        chosen = [s for s in self._launches.seats.values() if message.id in (None, s.id)]
        if message.id is not None and not chosen:
            self._clients.send(client, not_found(message.request, message.id))
            return
        stopped = Reason(code="stopped", what="stopped by `piehost stop`")
        for seat in chosen:
            seat.end(stopped)
        if message.id is None:
            self._launches.drop_waiting(stopped)
        self._clients.send(client, wire.Stopped(message.request, [s.id for s in chosen]))

    def _set_quota(self, client: Client, message: wire.SetQuota) -> None:
        seat = self._launches.find(message.id)
        if seat is None:
            self._clients.send(client, not_found(message.request, message.id))
            return
        before = seat.quota
        try:
            after = live_quota.change(seat, message.quotas)
        except HostError as error:
            answer = Failed(message.request, exit_code_of(error), error.reason)
            self._clients.send(client, answer)
            return
        now = seat.quota
        if (now.limits, now.rates) != (before.limits, before.rates):
            self._core.controller.send(control.SetLimits(seat.number, now.limits, now.rates))
        changes = " ".join(f"{key}={as_text(key, number)}" for key, number in after.items())
        log(f"{seat.id} ({seat.family.user}) has other quotas: {changes}")
        was = {key: before.values[key] for key in after}
        self._clients.send(client, wire.QuotaIsSet(message.request, was, after))

    def reload(self) -> None:
        """Reads piehost.toml again, for launches from now on. A wrong one changes nothing."""
        if self._settings.path is None:
            log("there is no piehost.toml to read again")
            return
        try:
            self._settings.reload()
        except HostError as error:
            reason = error.reason
            log(f"{reason.what}: {reason.why}; what was read before stays. try: {reason.hint}")
        else:
            log(f"{self._settings.path} is read again, for launches from now on")

    # --- controller and backend ----------------------------------------------------------------

    def from_controller(self, message: control.ControllerToHost) -> None:
        if isinstance(message, control.Stats):
            self._questions.answer(message)
            return
        if isinstance(message, control.BackendLost):  # the core has seen to it
            return
        seat = self._launches.seats.get(message.seat)
        if seat is None:
            return
        match message:
            case control.Sent():
                if isinstance(seat.owner, ClientOwner):
                    seat.owner.tell(wire.Message(seat.owner.request, message.data))
            case control.Taken():
                if isinstance(seat.owner, ClientOwner):
                    seat.owner.taken(message)
            case control.Ask():
                self._asks.ask(seat, message)
            case control.Released():
                seat.released(message.stats)
            case control.End():
                why = f"the controller ended it: {message.code}"
                seat.condemn(
                    Reason(code=message.code, what=message.message, why=why, hint=message.hint)
                )

    def core_progress(self, progress: Progress) -> None:
        self._observer.loading(progress)
        owners = [waiting.owner for waiting in self._launches.waiting]
        for client in {owner.client for owner in owners if isinstance(owner, ClientOwner)}:
            self._clients.send(client, progress)

    def core_loaded(self, ready: step.Ready) -> None:
        self._observer.ready(ready)

    def core_rings(self) -> None:
        self._launches.start_waiting()

    def core_lost(self, reason: Reason) -> None:
        self._launches.core_lost(reason)
        self._questions.core_lost()

    def core_absent(self, reason: Reason) -> None:
        self._launches.drop_waiting(reason)

    def core_failed(self, reason: Reason) -> None:
        self.core_lost(reason)
        self._failed(reason)

    def _failed(self, reason: Reason) -> None:
        self.failure = reason
        self._launches.drop_waiting(reason)
        self.ended.set()

    # --- launchers -----------------------------------------------------------------------------

    def from_launcher(self, message: launch.LauncherToHost, fds: list[int]) -> None:
        seat = self._launches.seats[message.seat]
        match message:
            case launch.Spawned():
                seat.spawned(message.pid, fds[0], message.sees_all)
            case launch.SpawnFailed():
                seat.spawn_failed(message)
            case launch.Exited():
                seat.exited(message)

    def launcher_lost(self, kind: str, reason: Reason) -> None:
        self._launches.launcher_lost(kind, reason)

    def launcher_failed(self, kind: str, reason: Reason) -> None:
        self.launcher_lost(kind, reason)
        self._failed(reason)

    # --- end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends every process and connection; returns when they are gone."""
        self._watchdog.close()
        self._launches.close(self.failure or _HOST_ENDED)
        self._launchers.close()
        self._core.close()
        self._services.close()
        self._clients.close()
        self._groups.close()


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
    if message.weather and not message.record:
        raise Refused("a weather is for runs that are recorded", code="bad_argument")
    for option, name in (("--user", message.user), ("--job", message.job)):
        if not (name.isprintable() and len(name.encode()) <= _MAX_NAME_OCTETS):
            raise Refused(
                f"{option} {name!r} is no name",
                f"a name has printable characters only, at most {_MAX_NAME_OCTETS} octets",
                "a word, such as ada or nightly-3",
                code="bad_argument",
            )


def _own_name() -> str:
    """The name of the user who runs the host; the number, if it has none."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
