"""What waits to be started and what runs, whoever asked for it."""

from __future__ import annotations

import resource
import select
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from msgspec import Struct

from piehost.wire import control, launch, step
from piehost.wire.client import EndedInfo, Reason

from . import accounts, allotment
from .cgroups import Detection, Groups, Missing
from .config import Settings
from .core import Core
from .errors import HostError, Refused
from .family import Family
from .launchers import Launchers, NoLauncher
from .log import log
from .owner import Owner
from .programs import Program
from .seats import Seat

_SHUTDOWN_SECONDS: Final = 5.0  # at most, to see the inferlets dead
# of file descriptors: the host's own, with clients and ready rings; and at most for each inferlet
_OWN_DESCRIPTORS: Final = 192
_SEAT_DESCRIPTORS: Final = 8
_REMEMBERED: Final = 64  # of those that ended, for `piehost ps --all` and `inspect`
# codes of ends that somebody wished, which are not worth a line in the log
_WISHED: Final = {"cancelled", "stopped", "client_gone", "parent_ended", "ended", "host_ended"}
_FEWER: Final = "fewer inferlets at once, or a higher `ulimit -n` for the server"
_PARENT_ENDED: Final = Reason(
    code="parent_ended",
    what="its parent ended",
    why="a child lives no longer than the inferlet that spawned it",
)


class Waiting(Struct, eq=False):
    """Something that waits for the model or for rings."""

    owner: Owner
    program: Program
    args: list[str]
    family: Family


class Launches:
    """Starts what is added in the order it came, as long as there are rings."""

    def __init__(
        self,
        core: Core,
        launchers: Launchers,
        settings: Settings,
        groups: Detection,
        gone: Callable[[Seat], None],
    ) -> None:
        """`gone` is called for each seat that is done, before its owner hears of it."""
        self.seats: dict[int, Seat] = {}
        self.waiting: deque[Waiting] = deque()
        self.count = 0  # of all that were started
        self.ended: deque[EndedInfo] = deque(maxlen=_REMEMBERED)  # the last ones
        self._core = core
        self._launchers = launchers
        self._gone = gone
        self._settings = settings
        self._groups = groups
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = max(1, (descriptors - _OWN_DESCRIPTORS) // _SEAT_DESCRIPTORS)

    # --- start ---------------------------------------------------------------------------------

    def check_room(self) -> None:
        """HostError if no more can be started now."""
        if len(self.seats) + len(self.waiting) >= self._most:
            raise HostError(
                f"{self._most} inferlets run or wait already",
                "the server has file descriptors for no more",
                "wait for some to end, or start the server under a higher `ulimit -n`",
                "too_many",
            )

    def add(self, waiting: Waiting) -> None:
        self.waiting.append(waiting)
        self.start_waiting()

    def start_waiting(self) -> None:
        while self.waiting and (ready := self._core.ready) is not None:
            waiting = self.waiting.popleft()  # at once: a failure of ours holds up no others
            try:
                quota = self._quota(waiting, ready)
            except HostError as error:
                waiting.owner.refused(error)
                continue
            try:
                rings = self._core.take_rings(quota.rings, len(self.waiting))
            except OSError as error:
                why = error.strerror or str(error)
                waiting.owner.refused(HostError("no rings can be made", why, _FEWER, "descriptors"))
                continue
            if rings is None:
                self.waiting.appendleft(waiting)
                return
            self.count += 1
            generation = self._core.restarts
            seat = Seat(
                self,
                rings,
                waiting.program,
                quota,
                waiting.family,
                waiting.owner,
                generation,
                self._groups_for_use(),
            )
            self.seats[seat.number] = seat
            self._start(seat, waiting.args, ready)

    def _groups_for_use(self) -> Groups | None:
        groups = self._groups.result()
        if isinstance(groups, Missing):
            return None
        groups.place(self._launchers.children().values(), self._core.children())
        return groups

    def _quota(self, waiting: Waiting, ready: step.Ready) -> allotment.Quota:
        family, parent = waiting.family, waiting.owner.parent
        quota = allotment.resolve(
            waiting.program.profile,
            ready.model,
            ready.pages,
            self._settings.ceilings(family.user, family.program),
            family.manifest_quota,
            family.launch_quota,
            parent.live_quota if parent is not None else None,
        )
        groups = self._groups.result()
        if isinstance(groups, Missing) and quota.need_cgroup and "cgroup" not in family.waived:
            raise Refused(
                f"quota {' and '.join(quota.need_cgroup)} cannot be kept on this machine",
                f"that takes control groups, and {groups.why}",
                f"{groups.hint}; or run without: --allow-degraded cgroup",
                "cgroup",
            )
        return quota

    def _start(self, seat: Seat, args: list[str], ready: step.Ready) -> None:
        try:
            seat.start(
                args,
                ready.model,
                self._core.vocabulary,
                self._core.controller.send,
                self._launchers.spawn,
            )
        except NoLauncher as error:
            seat.launcher_lost(error.reason)
        except OSError as error:
            seat.spawn_failed(
                launch.SpawnFailed(
                    seat=seat.number,
                    stage="descriptors",
                    errno=error.errno or 0,
                    message=error.strerror or str(error),
                    hint=_FEWER,
                )
            )

    def find(self, inferlet: str) -> Seat | None:
        """What runs under that id."""
        return next((seat for seat in self.seats.values() if seat.id == inferlet), None)

    # --- end -----------------------------------------------------------------------------------

    def end(self, owner: Owner, reason: Reason) -> None:
        """Ends what runs for `owner`, or waits to."""
        if owner.seat is not None:
            owner.seat.end(reason)
            return
        for waiting in self.waiting:
            if waiting.owner is owner:
                self.waiting.remove(waiting)
                owner.refused(HostError(reason.what, reason.why, reason.hint, reason.code))
                return

    def drop_waiting(self, reason: Reason) -> None:
        """Nothing that waits will be started."""
        while self.waiting:
            owner = self.waiting.popleft().owner
            owner.refused(HostError(reason.what, reason.why, reason.hint, reason.code))

    def answer(self, seat: Seat, message: control.Reply | control.ChildEnded) -> None:
        """To the controller, unless the seat is not its any more."""
        if not seat.freed and self._is_current(seat):
            self._core.controller.send(message)

    def seat_dead(self, seat: Seat) -> None:
        for child in list(seat.children):
            self.end(child, _PARENT_ENDED)
        if seat.admitted and self._is_current(seat):
            self._core.controller.send(control.Release(seat=seat.number))
        else:
            seat.released(None)

    def seat_done(self, seat: Seat) -> None:
        if self._is_current(seat):
            self._core.drop_rings(seat.number)
        del self.seats[seat.number]
        self._remember(accounts.ended_info(seat))
        self._gone(seat)
        seat.owner.done(seat)

    def _remember(self, ended: EndedInfo) -> None:
        self.ended.append(ended)
        reason = ended.reason
        if reason is not None and reason.code not in _WISHED:
            why = f": {reason.why}" if reason.why else ""
            log(f"{ended.id} ({ended.user}) ended: {reason.code}: {reason.what}{why}")

    def _is_current(self, seat: Seat) -> bool:
        return seat.generation == self._core.restarts and self._core.ready is not None

    def core_lost(self, reason: Reason) -> None:
        """Backend and controller are gone, and with them all that ran on them. A child that waits
        must not begin on new ones: they do not know its parent, whose death may be told late."""
        for waiting in list(self.waiting):
            if waiting.owner.parent is not None:
                self.end(waiting.owner, _PARENT_ENDED)
        for seat in list(self.seats.values()):
            if not seat.freed:  # what it said last may be lost, even if it has ended well since
                seat.condemn(reason)
            seat.released(None)

    def launcher_lost(self, kind: str, reason: Reason) -> None:
        """The launcher of programs of that kind is gone, and its children with it."""
        for seat in [s for s in self.seats.values() if s.program.kind == kind]:
            seat.launcher_lost(reason)

    def close(self, reason: Reason) -> None:
        """Ends all; returns when the processes are gone."""
        self.drop_waiting(reason)
        poll = select.poll()
        alive = set()
        for seat in self.seats.values():
            seat.end(reason)
            if seat.pidfd >= 0:
                alive.add(seat.pidfd)
                poll.register(seat.pidfd, select.POLLIN)
        deadline = time.monotonic() + _SHUTDOWN_SECONDS
        while alive and (left := deadline - time.monotonic()) > 0:
            for fd, _ in poll.poll(left * 1000):
                poll.unregister(fd)
                alive.discard(fd)
        for seat in list(self.seats.values()):
            seat.released(None)
            seat.launcher_lost(reason)  # its exit will not be reported any more
