"""What one inferlet may use: every default in one place, and how it is overridden.

Layers, the later ones win: the defaults here; what the operator gives, which is also the ceiling of
the next two (`config.py`); `[quota]` of inferlet.toml; `--quota` of the launch; what the operator
changed while its parent ran.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from inferlet.abi import MAX_FRAME_BYTES, Limits, ModelInfo
from msgspec import Struct

from piehost.wire.control import Rates
from piehost.wire.launch import Rlimits

from .errors import Refused
from .quotas import GIB, MIB, Value, as_text, exceeds, parse_value
from .rings import RingSizes

DEFAULT_KV_PAGES: Final = 1024
DEFAULT_EXPORT_PAGES: Final = 1024
DEFAULT_RING_BYTES: Final = MIB  # of each
DEFAULT_SHARE: Final = 100
DEFAULT: Final = "default"  # the source of a value that nobody gave
LIVE: Final = "quota set"  # of one that was changed while the inferlet ran
_PAGE: Final = 4096  # of memory
# Address space by profile, if it is not 1 GiB. What NumPy and its like map and never touch counts;
# Node starts with 0.2 GiB, and reserves 0.1 GiB with each thread.
_ADDRESS_SPACE: Final = {"python": 4 * GIB, "node": 2 * GIB}
NEED_CGROUP: Final = ("memory", "cpu")


class Ceiling(Struct, frozen=True):
    """What the operator gives for one quota: its default, and the most there may be."""

    value: int | None
    where: str


class Quota(Struct, kw_only=True):
    """The quotas of one launch, ready to hand out."""

    values: dict[str, int | None]  # all of `quotas.QUOTAS`
    sources: dict[str, str]  # where each is given
    limits: Limits
    rates: Rates
    rlimits: Rlimits
    memory: int  # resident, in octets
    cpu: int | None  # percent of one core
    threads: int
    output_bytes: int
    wall_seconds: int | None
    egress_bytes: int
    egress_seconds: int

    @property
    def rings(self) -> RingSizes:
        return RingSizes(self.limits.ring_bytes, self.limits.ring_in_bytes)

    @property
    def need_cgroup(self) -> list[str]:
        """Those that somebody asked for and only a control group can enforce."""
        return [
            key
            for key in NEED_CGROUP
            if self.values[key] is not None and self.sources[key] != DEFAULT
        ]

    def changed(self, changes: Mapping[str, int | None]) -> Quota:
        """With these values instead, given while the inferlet runs."""
        return _quota({**self.values, **changes}, self.sources | dict.fromkeys(changes, LIVE))


def default_rings(vocab_size: int) -> RingSizes:
    """At least 1 MiB each; room for one distribution over the whole vocabulary (id and
    probability: 8 octets a token) in ring out, for one mask (a bit a token) in ring in."""
    return RingSizes(
        max(DEFAULT_RING_BYTES, _whole_pages(8 * vocab_size)),
        max(DEFAULT_RING_BYTES, _whole_pages(-(-vocab_size // 8))),
    )


def defaults(profile: str, model: ModelInfo, pool_pages: int) -> dict[str, int | None]:
    rings = default_rings(model.vocab_size)
    return {
        "kv_pages": min(DEFAULT_KV_PAGES, pool_pages),
        "embeds": 1024,
        "tokens": 4096,
        "commands": 16384,
        "top_k": model.vocab_size,
        "ring_bytes": rings.out,
        "ring_in_bytes": rings.into,
        "history": 65536,
        "export_pages": min(DEFAULT_EXPORT_PAGES, pool_pages // 2),
        "children": 8,
        "subscriptions": 64,
        "http_streams": 8,
        "store_bytes": 64 * MIB,
        "egress_bytes": 64 * MIB,
        "egress_seconds": 30,
        "tokens_per_second": None,
        "commands_per_second": None,
        "share": DEFAULT_SHARE,
        "priority": 0,
        "cpu": None,
        "cpu_seconds": None,
        "wall_seconds": None,
        "memory": GIB,
        "address_space": _ADDRESS_SPACE.get(profile, GIB),
        "stack": 8 * MIB,
        "threads": 64,
        "fds": 64,
        "file_size": MIB if profile == "python" else 0,
        "output_bytes": MIB,
    }


def resolve(
    profile: str,
    model: ModelInfo,
    pool_pages: int,
    operator: Mapping[str, Ceiling],
    manifest: Mapping[str, Value],
    launch: Mapping[str, Value],
    live: Mapping[str, int | None] | None = None,
) -> Quota:
    """The quotas of one launch of a program under `profile`. Refused for an unknown key, a bad
    value, or one over a ceiling."""
    values = defaults(profile, model, pool_pages)
    sources = dict.fromkeys(values, DEFAULT)
    for key, ceiling in operator.items():
        values[key], sources[key] = ceiling.value, ceiling.where
    for layer, where in ((manifest, "inferlet.toml"), (launch, "--quota")):
        for key, asked in layer.items():
            number = parse_value(key, asked, where)
            _check_ceiling(key, number, where, operator)
            values[key], sources[key] = number, where
    quota = _quota(values, sources)
    return quota.changed(live) if live else quota


def _check_ceiling(
    key: str, number: int | None, where: str, operator: Mapping[str, Ceiling]
) -> None:
    ceiling = operator.get(key)
    if ceiling is None and key == "share":  # it takes from other users, so it is not for all to ask
        ceiling = Ceiling(DEFAULT_SHARE, "default, where the operator gives none")
    if ceiling is not None and exceeds(number, ceiling.value):
        most = as_text(key, ceiling.value)
        raise Refused(
            f"quota {key}={as_text(key, number)} is over the server's ceiling of {most}",
            f"it is given in {where}; the ceiling is in: {ceiling.where}",
            f"{key}={most} or less",
            "bad_quota",
        )


def _quota(values: dict[str, int | None], sources: dict[str, str]) -> Quota:
    number_of = {key: number for key, number in values.items() if number is not None}
    return Quota(
        values=values,
        sources=sources,
        limits=Limits(
            kv_pages=number_of["kv_pages"],
            embeds=number_of["embeds"],
            tokens=number_of["tokens"],
            commands=number_of["commands"],
            frame_bytes=MAX_FRAME_BYTES,
            top_k=number_of["top_k"],
            ring_bytes=_whole_pages(number_of["ring_bytes"]),
            ring_in_bytes=_whole_pages(number_of["ring_in_bytes"]),
            history=number_of["history"],
            export_pages=number_of["export_pages"],
            children=number_of["children"],
            subscriptions=number_of["subscriptions"],
            http_streams=number_of["http_streams"],
            store_bytes=number_of["store_bytes"],
        ),
        rates=Rates(
            tokens_per_second=values["tokens_per_second"],
            commands_per_second=values["commands_per_second"],
            share=number_of["share"],
            priority=number_of["priority"],
        ),
        rlimits=Rlimits(
            address_space=number_of["address_space"],
            open_files=number_of["fds"],
            file_size=number_of["file_size"],
            cpu_seconds=values["cpu_seconds"],
            stack=number_of["stack"],
            threads=number_of["threads"],
        ),
        memory=number_of["memory"],
        cpu=values["cpu"],
        threads=number_of["threads"],
        output_bytes=number_of["output_bytes"],
        wall_seconds=values["wall_seconds"],
        egress_bytes=number_of["egress_bytes"],
        egress_seconds=number_of["egress_seconds"],
    )


def _whole_pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
