"""What is told of an inferlet: while it runs, and once it has ended."""

from __future__ import annotations

import time

from piehost.wire import client as wire
from piehost.wire import control

from .process_use import open_files
from .sandbox.failure import CONTROLS
from .seats import Seat


def info(seat: Seat, stats: control.SeatStats | None) -> wire.InferletInfo:
    """`stats`: the controller's, if it has told them."""
    use = seat.process_use
    return wire.InferletInfo(
        id=seat.id,
        program=seat.program.path,
        pid=seat.pid,
        client_pid=seat.owner.client_pid,
        state=seat.state,
        seconds=time.monotonic() - seat.began,
        stats=stats or seat.stats,
        user=seat.family.user,
        job=seat.family.job,
        parent=_parent(seat),
        name=seat.program.name,
        cpu_seconds=use.cpu_seconds,
        memory_bytes=use.memory,
        reason=seat.reason,
    )


def ended_info(seat: Seat) -> wire.EndedInfo:
    """What is remembered of it, once it is done."""
    result = seat.result(0)
    return wire.EndedInfo(
        id=seat.id,
        program=seat.program.path,
        code=result.code,
        reason=result.reason,
        at=time.time(),
        seconds=time.monotonic() - seat.began,
        stats=seat.stats,
        usage=seat.usage,
        user=seat.family.user,
        job=seat.family.job,
        parent=_parent(seat),
    )


def details(seat: Seat, held: dict[str, float]) -> wire.Details:
    """`held`: what it holds by key of its quota, as far as the controller knows."""
    return wire.Details(
        quotas=_quotas(seat, held),
        controls=_controls(seat),
        waived=seat.family.waived,
        egress=seat.family.egress,
        children=[child.seat.id for child in seat.children if child.seat is not None],
        profile=seat.program.profile,
        cgroups=[str(folder) for folder in seat.group_folders],
    )


def _parent(seat: Seat) -> str:
    return seat.owner.parent.id if seat.owner.parent is not None else ""


def _controls(seat: Seat) -> list[str]:
    """Those of the sandbox in force: nothing starts without the others, but a machine may lack
    mount namespaces, and groups for quotas that nobody gave."""
    missing = set(seat.family.waived)
    if seat.sees_all:
        missing.add("mounts")
    if not seat.in_group:
        missing.add("cgroup")
    return [control for control in CONTROLS if control not in missing]


def _quotas(seat: Seat, held: dict[str, float]) -> dict[str, wire.QuotaUse]:
    """By key: the cap, where it comes from, and what is used of it as far as that is known."""
    use, group = seat.process_use, seat.group_usage
    used = held | {
        "children": seat.family.descendants,
        "egress_bytes": seat.family.egress_octets,
        "cpu_seconds": use.cpu_seconds,
        "wall_seconds": time.monotonic() - seat.began,
        "memory": group.memory if group is not None else use.memory,
        "address_space": use.address_space,
        "threads": group.threads if group is not None else use.threads,
        "output_bytes": seat.written,
    }
    if seat.pidfd >= 0 and (fds := open_files(seat.pid)) is not None:
        used["fds"] = fds
    quota = seat.quota
    return {
        key: wire.QuotaUse(cap=cap, used=used.get(key), source=quota.sources[key])
        for key, cap in quota.values.items()
    }
