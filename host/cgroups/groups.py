"""The control groups of one host: made ahead, one taken for each inferlet.

An inferlet starts outside of its group and is moved into it some milliseconds later, by a thread of
its own (`mover.py`), so that no launch waits for that. What it has taken by then is looked at: who
holds more than its limits is to be ended. What it holds within them is not counted again, so that
beside its limit of memory it can have what can be touched in those milliseconds. That is charged to
the group of the process that started it (`place`), and so counts for all together.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import traceback
from collections import deque
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from .limits import GroupLimits, GroupUsage
from .mover import Job, Mover
from .places import Places
from .tree import Tree, remove_stale

_READY: Final = 32  # groups made ahead
_USUAL: Final = GroupLimits(memory=1 << 30, threads=64)  # of inferlets that ask for nothing
_OOM_SCORE: Final = "500"  # when the whole machine runs out of memory, inferlets go first
_PAGE: Final = os.sysconf("SC_PAGESIZE")
_PRIVATE: Final = re.compile(rb"^Private_(?:Clean|Dirty): +(\d+) kB$", re.MULTILINE)


class Fault(NamedTuple):
    """Why a process must be ended. `code`: "memory" or "threads", it holds more than its group may;
    "cgroup", it could not be put there."""

    code: str
    why: str


Notify = Callable[[Callable[[], None]], object]


class Groups:
    """Those of one host. `detect` makes it."""

    def __init__(self, tree: Tree, places: Places, notify: Notify) -> None:
        self._tree = tree
        self._notify = notify
        self._mover = Mover(tree)
        self._ready: deque[Group] = deque()
        self._made = 0
        self._placed: set[int] = set()
        self._usual = _USUAL  # of the last that was taken
        self._ready.extend(self._make() for _ in range(_READY))
        self._mover.do(partial(remove_stale, places))

    def place(self, launchers: Collection[int], server: Mapping[str, int]) -> None:
        """Puts our own processes where they belong, those that are not there yet: `launchers` where
        what they take, and inferlets before they are in their groups, counts for the cap on all
        together; each of `server`, by name, where it has a weight of its own."""
        self._placed &= {*launchers, *server.values()}  # a dead one's pid may come again
        for pid in launchers:
            self._place(pid, partial(self._tree.adopt, pid))
        for name, pid in server.items():
            self._place(pid, partial(self._tree.separate, name, pid))

    def _place(self, pid: int, move: Job) -> None:
        def job() -> None:
            with contextlib.suppress(OSError):  # it is dead; another takes its place
                move()

        if pid not in self._placed:
            self._placed.add(pid)
            self._mover.do(job)

    def take(self, limits: GroupLimits, on_fault: Callable[[Fault], None]) -> Group:
        """A group with these limits. Does not wait. `on_fault` is called, by way of `notify`, when
        the process in it must be ended."""
        group = self._ready.popleft()
        group.prepare(limits, on_fault)
        self._usual = limits
        self._ready.append(self._make())
        return group

    def close(self) -> None:
        """Removes all; returns when that is done. Whoever was in a group must be dead."""
        self._mover.close()
        self._tree.close()

    def _make(self) -> Group:
        self._made += 1
        return Group(self._tree, self._mover, self._notify, str(self._made), self._usual)


class Group:
    """Of one process. The mover's thread carries out what changes it, in the order asked: all of it
    is put off alike."""

    def __init__(
        self, tree: Tree, mover: Mover, notify: Notify, name: str, limits: GroupLimits
    ) -> None:
        """`limits`: those that it will probably have."""
        self._tree = tree
        self._mover = mover
        self._notify = notify
        self._name = name
        self._limits = limits
        self._written: GroupLimits | None = None
        self._on_fault: Callable[[Fault], None] = lambda _: None
        self.folders = tree.folders(name)
        self._mover.do_later(self._watched(self._make))

    def prepare(self, limits: GroupLimits, on_fault: Callable[[Fault], None]) -> None:
        """What `join` will enforce."""
        self._limits, self._on_fault = limits, on_fault

    def set(self, limits: GroupLimits) -> None:
        """From now on. A fault if it holds more memory already."""
        self._limits = limits
        self._mover.do_later(self._watched(lambda: self._limit() or self._too_much_memory()))

    def join(self, pid: int, pidfd: int) -> None:
        """Moves the process there soon, if it is not dead by then. A fault if it holds more than
        the limits."""
        held = os.dup(pidfd)  # the caller's may be closed by then
        self._mover.do_later(self._watched(partial(self._move, pid, held)))

    def usage(self) -> GroupUsage | None:
        """None if the group is gone, or not made yet."""
        with contextlib.suppress(OSError):
            return self._tree.usage(self._name)
        return None

    def end(self) -> None:
        """Removes it, as soon as who was in it is gone."""
        self._mover.do_later(partial(self._mover.remove, self._name))

    def _watched(self, job: Callable[[], Fault | None]) -> Job:
        def run() -> None:
            try:
                fault = job()
            except OSError as error:
                fault = Fault("cgroup", f"{error.filename or 'its group'}: {error.strerror}")
            except Exception as error:  # a fault of ours must not end the thread, nor free anybody
                traceback.print_exc()
                fault = Fault("cgroup", f"{type(error).__name__}: {error}")
            if fault is not None:
                self._notify(partial(self._on_fault, fault))

        return run

    def _make(self) -> Fault | None:
        self._tree.make(self._name)
        return self._limit()

    def _limit(self) -> Fault | None:
        limits = self._limits
        if limits != self._written:
            try:
                self._tree.limit(self._name, limits)
            except OSError as error:
                if error.errno != errno.EBUSY:  # v1 cannot go below what is held
                    raise
                return _too_much("memory", limits.memory)
            self._written = limits
        return None

    def _move(self, pid: int, pidfd: int) -> Fault | None:
        try:
            if _has_ended(pidfd):  # and its pid may be another's
                return None
            if fault := self._limit():
                return fault
            self._tree.attach(self._name, pid)
        except ProcessLookupError:
            return None
        finally:
            os.close(pidfd)
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/oom_score_adj").write_text(_OOM_SCORE)
        if fault := self._too_much_memory():
            return fault
        threads = self._limits.threads
        if int(self._tree.read(self._name, "pids", "pids.current")) > threads:
            return _too_much("threads", threads)
        return None

    def _too_much_memory(self) -> Fault | None:
        """Of the process, whether it is charged to the group or was taken before."""
        most = self._limits.memory
        pids = self._tree.read(self._name, "memory", "cgroup.procs").split()
        if any(_private_memory(int(pid), most) > most for pid in pids):
            return _too_much("memory", most)
        return None


def _too_much(code: str, limit: int) -> Fault:
    return Fault(code, f"quota {code} is {limit}")


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()  # not select(2): a busy host has descriptors beyond 1,023
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _private_memory(pid: int, enough: int) -> int:
    """Octets resident and of no other process. What it shares (the zygote's, libraries) counts as
    well as long as it stays below `enough`, since telling them apart takes a while; 0 if the
    process is gone."""
    try:
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
        if resident <= enough:
            return resident
        smaps = Path(f"/proc/{pid}/smaps_rollup").read_bytes()
    except (OSError, IndexError):
        return 0
    return sum(int(kib) << 10 for kib in _PRIVATE.findall(smaps))
