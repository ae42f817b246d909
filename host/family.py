"""What an inferlet that a client launched shares with its descendants."""

from __future__ import annotations

from msgspec import Struct

from .quotas import Value


class Family(Struct, eq=False, kw_only=True):
    """One launch, however many processes come of it."""

    user: str  # whose store, topics and exports they see
    program: str  # the name of the launched one, by which the operator's ceilings go
    job: str  # empty until the first one starts, if the client gave no name: then its id
    egress: list[str]  # grants, checked
    waived: list[str]  # sandbox controls given up by name
    manifest_quota: dict[str, Value]
    launch_quota: dict[str, str]
    deadline: float | None = None  # Unix time; from the first one's start
    descendants: int = 0  # that live, or wait to be started
    egress_octets: int = 0  # used so far, by all of them
