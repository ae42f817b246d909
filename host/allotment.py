"""What one inferlet may use: every default in one place, and how it is overridden.

Three layers, the later ones win: the defaults here, `[quota]` of inferlet.toml, `--quota` of the
launch. A value that the operator gives to `piehost serve --quota` becomes the default and the
ceiling: a launch that asks for more is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from inferlet.abi import MAX_FRAME_BYTES, Limits, ModelInfo
from msgspec import Struct

from piehost.wire.launch import Rlimits

from .errors import Refused
from .quotas import GIB, MIB, Value, parse_value
from .rings import RingSizes

DEFAULT_KV_PAGES: Final = 1024
DEFAULT_EXPORT_PAGES: Final = 1024
DEFAULT_RING_BYTES: Final = MIB  # of each
_PAGE: Final = 4096  # of memory
# Address space by profile, if it is not 1 GiB. What NumPy and its like map and never touch counts;
# Node starts with 0.2 GiB, and reserves 0.1 GiB with each thread.
_MEMORY: Final = {"python": 4 * GIB, "node": 2 * GIB}


class Quota(Struct, kw_only=True):
    """The quotas of one launch, ready to hand out."""

    limits: Limits
    rlimits: Rlimits
    output_bytes: int
    wall_seconds: int | None
    egress_bytes: int
    egress_seconds: int

    @property
    def rings(self) -> RingSizes:
        return RingSizes(self.limits.ring_bytes, self.limits.ring_in_bytes)


def default_rings(vocab_size: int) -> RingSizes:
    """At least 1 MiB each; room for one distribution over the whole vocabulary (id and
    probability: 8 octets a token) in ring out, for one mask (a bit a token) in ring in."""
    return RingSizes(
        max(DEFAULT_RING_BYTES, _whole_pages(8 * vocab_size)),
        max(DEFAULT_RING_BYTES, _whole_pages(-(-vocab_size // 8))),
    )


def resolve(
    profile: str,
    model: ModelInfo,
    pool_pages: int,
    operator: Mapping[str, int],
    manifest: Mapping[str, Value],
    launch: Mapping[str, Value],
) -> Quota:
    """The quotas of one launch of a program under `profile`. Refused for an unknown key, a bad
    value, or one over a ceiling."""
    rings = default_rings(model.vocab_size)
    value: dict[str, int | None] = {
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
        "memory": _MEMORY.get(profile, GIB),
        "stack": 8 * MIB,
        "fds": 64,
        "file_size": MIB if profile == "python" else 0,
        "cpu_seconds": None,
        "wall_seconds": None,
        "output_bytes": MIB,
    }
    value |= operator
    for layer, where in ((manifest, "inferlet.toml"), (launch, "--quota")):
        for key, asked in layer.items():
            number = parse_value(key, asked, where)
            if key in operator and number > operator[key]:
                raise Refused(
                    f"quota {key}={number} is over the server's ceiling of {operator[key]}",
                    f"it is given in {where}; the ceiling by `piehost serve --quota`",
                    f"--quota {key}={operator[key]} or less",
                    "bad_quota",
                )
            value[key] = number
    number_of = {key: number for key, number in value.items() if number is not None}
    return Quota(
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
        rlimits=Rlimits(
            address_space=number_of["memory"],
            open_files=number_of["fds"],
            file_size=number_of["file_size"],
            cpu_seconds=value["cpu_seconds"],
            stack=number_of["stack"],
        ),
        output_bytes=number_of["output_bytes"],
        wall_seconds=value["wall_seconds"],
        egress_bytes=number_of["egress_bytes"],
        egress_seconds=number_of["egress_seconds"],
    )


def _whole_pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
