"""How a host is started: the model, where it runs, how it schedules, what launches may use."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

# fields that are options of the backend under the same name (with dashes)
_BACKEND = (
    "model", "device", "dtype", "engine", "page_size", "kv_pages", "kv_memory", "swap_pages",
    "max_context", "threads",
)  # fmt: skip


class Options(Struct, kw_only=True, frozen=True):
    """None leaves the choice to the backend."""

    model: str = "default"  # "default", "scripted[:PATH.toml]", a folder, or a hub id
    device: str | None = None
    dtype: str | None = None
    engine: str | None = None
    page_size: int | None = None
    kv_pages: int | None = None
    kv_memory: float | None = None  # fraction of the free memory
    swap_pages: int | None = None  # of host memory
    max_context: int | None = None
    threads: int | None = None
    policy: str = "work-conserving"
    quotas: dict[str, str] = {}  # the operator's: defaults and ceilings, over those of the file
    egress: list[str] | None = None  # grants that those of launches must lie within
    config: str | None = None  # path of piehost.toml, if there is one

    def backend_arguments(self) -> list[str]:
        """As the command line of `piehost.gpu_backend` takes them."""
        arguments = []
        for name in _BACKEND:
            value = getattr(self, name)
            if value is not None:
                arguments += [f"--{name.replace('_', '-')}", str(value)]
        return arguments

    def as_text(self) -> dict[str, str]:
        """What was chosen, for people and for comparing with another host's."""
        chosen = {name: getattr(self, name) for name in (*_BACKEND, "policy")}
        return {name: str(value) for name, value in chosen.items() if value is not None}


def named_model(text: str) -> str:
    """`text` as one name whatever the working directory: a folder, or the path of a script,
    becomes absolute."""
    if text in ("default", "scripted"):
        return text
    kind, colon, script = text.partition(":")
    if kind == "scripted" and colon:
        return f"scripted:{Path(script).resolve()}" if script else text
    path = Path(text)
    return str(path.resolve()) if path.is_dir() else text


def encode(options: Options) -> str:
    return msgspec.json.encode(options).decode()


def decode(text: str) -> Options:
    return msgspec.json.decode(text, type=Options)
