"""Who an inferlet runs for, and hears of it: the client that launched it, or its parent."""

from __future__ import annotations

from collections.abc import Callable

from inferlet.errors import UnavailableError

from piehost.wire import client as wire
from piehost.wire import control
from piehost.wire.client import Failed, HostToClient, Reason

from .clients import Client, Clients
from .conform.weather import Weather
from .errors import HostError, exit_code_of
from .recording import Recorder
from .seats import Seat


class ClientOwner:
    """A client, which knows the launch by the number `request`.

    What it sends before the inferlet is admitted waits here, and what the inferlet sends before
    `Started` does: launcher and controller are not in step.
    """

    parent = None
    child = 0

    def __init__(
        self,
        client: Client,
        request: int,
        clients: Clients,
        to_controller: Callable[[control.HostToController], None],
        over: Callable[[], object],
        recorder: Recorder | None = None,
        weather: Weather | None = None,
    ) -> None:
        """`over` is called once, just before the client is told the end."""
        self.client = client
        self.request = request
        self.seat: Seat | None = None
        self.untaken = 0  # the weight of its messages that the inferlet has not received
        self._clients = clients
        self._to_controller = to_controller
        self._over = over
        self.recorder = recorder
        self.weather = weather
        self._started = False
        self._early_input: list[wire.Input | wire.CloseInput] = []
        self._held: list[HostToClient] = []

    @property
    def client_pid(self) -> int:
        return self.client.pid

    def refused(self, error: HostError) -> None:
        self._over()
        answer = Failed(request=self.request, code=exit_code_of(error), reason=error.reason)
        self._clients.send(self.client, answer)

    def admitted(self, seat: Seat) -> None:
        self.seat = seat
        for message in self._early_input:
            self.input(message)
        self._early_input.clear()

    def started(self, seat: Seat) -> None:
        self._started = True
        self.tell(wire.Started(self.request, seat.id, seat.pid))
        for held in self._held:
            self.tell(held)
        self._held.clear()

    def output(self, stream: int, data: bytes) -> None:
        self.tell(wire.Output(self.request, stream, data))

    def done(self, seat: Seat) -> None:
        self._over()
        self._clients.send(self.client, seat.result(self.request))

    def tell(self, message: HostToClient) -> None:
        if self._started:
            self._clients.send(self.client, message)
        else:
            self._held.append(message)

    def input(self, message: wire.Input | wire.CloseInput) -> None:
        """A message of the client's, for the inferlet's `receive`."""
        if self.seat is None:
            self._early_input.append(message)
        elif isinstance(message, wire.Input):
            self._to_controller(control.Deliver(seat=self.seat.number, data=message.data))
        else:
            self._to_controller(control.CloseInput(seat=self.seat.number))

    def taken(self, message: control.Taken) -> None:
        weight = message.size + message.messages * wire.MESSAGE_OVERHEAD
        self.untaken -= weight
        self.tell(wire.InputTaken(self.request, weight))


class ParentOwner:
    """The inferlet `parent`, for which the controller knows the child by the number `child`."""

    recorder = None  # what a child says is in its parent's recording
    weather = None

    def __init__(
        self,
        parent: Seat,
        child: int,
        request: int,
        answer: Callable[[Seat, control.Reply | control.ChildEnded], None],
    ) -> None:
        """`request` is that of the `Ask`; `answer` reaches the parent if it still lives."""
        self.parent = parent
        self.child = child
        self.seat: Seat | None = None
        self._request = request
        self._answer = answer
        self._started = False
        parent.children.add(self)
        parent.family.descendants += 1

    @property
    def client_pid(self) -> int:
        return self.parent.owner.client_pid

    def refused(self, error: HostError) -> None:
        self._failed(error.reason)
        self._leave()

    def admitted(self, seat: Seat) -> None:
        self.seat = seat

    def started(self, seat: Seat) -> None:
        self._started = True
        self._answer(self.parent, control.Reply(self._request, seat.id))

    def output(self, stream: int, data: bytes) -> None:
        self.parent.owner.output(stream, data)

    def done(self, seat: Seat) -> None:
        result = seat.result(0)
        if self._started:
            ended = control.ChildEnded(self.child, result.code)
            self._answer(self.parent, ended)
        elif result.reason is not None:
            self._failed(result.reason)
        self._leave()

    def _leave(self) -> None:
        self.parent.family.descendants -= 1
        self.parent.children.discard(self)
        self.parent.child_left()

    def _failed(self, reason: Reason) -> None:
        why = f"{reason.what}: {reason.why}" if reason.why else reason.what
        error = (UnavailableError.code, f"the child did not start: {why}", reason.hint)
        self._answer(self.parent, control.Reply(self._request, error=error))
