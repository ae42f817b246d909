"""What inferlets ask of the host itself: children, and what is left of their quotas."""

from __future__ import annotations

import time
from typing import Any

from inferlet.errors import (
    ArgumentError,
    InferletError,
    NotFoundError,
    QuotaError,
    UnavailableError,
)

from piehost.wire import control
from piehost.wire import services as wire
from piehost.wire.client import Reason

from . import programs
from .errors import HostError
from .launches import Launches, Waiting
from .owners import ParentOwner
from .programs import Program
from .seats import Seat
from .services import Answer, ErrorAnswer, Services

_ENDED_BY_PARENT = Reason(code="ended", what="its parent ended it")


class Asks:
    """Each `Ask` is answered with one `Reply`: at once, or when a service or launch is through."""

    def __init__(self, launches: Launches, services: Services) -> None:
        self._launches = launches
        self._services = services

    def ask(self, seat: Seat, message: control.Ask) -> None:
        def reply(value: Any, error: ErrorAnswer | None = None) -> None:
            answer = control.Reply(message.request, value, error)
            self._launches.answer(seat, answer)

        try:
            match message.call:
                case wire.Spawn() as call:
                    self._spawn(seat, message.request, call)
                case wire.EndChild(child):
                    self._end_child(seat, child)
                    reply(None)
                case wire.Quota(left):
                    self._quota(seat, left, reply)
                case call:
                    self._services.ask(seat, call, reply)
        except InferletError as error:
            reply(None, (error.code, error.message, error.hint))

    # --- children ------------------------------------------------------------------------------

    def _spawn(self, seat: Seat, request: int, call: wire.Spawn) -> None:
        most, alive = seat.quota.limits.children, seat.family.descendants
        if alive >= most:
            raise QuotaError(
                f"{alive} inferlets that descend from this launch live; the cap is {most}",
                "wait for one to end, or launch with a larger --quota children",
            )
        if any("\0" in argument for argument in call.args):  # C programs would see what is before
            raise ArgumentError("an argument holds a null character", "send it as a message")
        program = self._program(seat.program, call.program)
        if seat.state not in ("starting", "running"):
            raise UnavailableError("the inferlet itself is being ended")
        owner = ParentOwner(seat, call.child, request, self._launches.answer)
        self._launches.add(Waiting(owner, program, call.args, seat.family))

    def _program(self, own: Program, name: str) -> Program:
        if name and name not in own.children:
            known = ", ".join(own.children) or "none"
            raise NotFoundError(
                f"{name!r} is no child program of this inferlet; it has {known}",
                'name it in inferlet.toml: [children], then name = "path"',
            )
        try:
            self._launches.check_room()
            return programs.resolve_child(own, name) if name else own
        except HostError as error:
            reason = error.reason
            why = f"{reason.what}: {reason.why}" if reason.why else reason.what
            raise UnavailableError(why, reason.hint) from error

    def _end_child(self, seat: Seat, child: int) -> None:
        for owner in list(seat.children):
            if owner.child == child:
                self._launches.end(owner, _ENDED_BY_PARENT)

    # --- quotas --------------------------------------------------------------------------------

    def _quota(self, seat: Seat, left: dict[str, float], reply: Answer) -> None:
        """Answers with `left` and what the host knows of; without `store_bytes` if the store cannot
        be asked."""
        quota, family = seat.quota, seat.family
        values = left | {
            "children": max(0, quota.limits.children - family.descendants),
            "egress_bytes": max(0, quota.egress_bytes - family.egress_octets),
        }
        if quota.rlimits.cpu_seconds is not None:
            used = seat.process_use.cpu_seconds
            values["cpu_seconds"] = max(0.0, quota.rlimits.cpu_seconds - used)
        if family.deadline is not None:
            values["wall_seconds"] = max(0.0, family.deadline - time.time())

        def stored(octets: Any, error: ErrorAnswer | None) -> None:
            if error is None:
                values["store_bytes"] = max(0, quota.limits.store_bytes - octets)
            reply(values, None)

        self._services.ask(seat, wire.StoreUsed(), stored)
