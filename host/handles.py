"""Which fields of a command hold handles, of which kind, and which command makes one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from inferlet import abi
from inferlet.abi import AnyCommand, Command

# what a field holds handles of, by its name; and where a command differs from others in that
_KINDS: Final = {
    "queue": "queue", "kv": "kv", "source": "kv", "span": "kv", "reads": "kv", "write": "kv",
    "pages": "kv", "emb": "emb", "inputs": "emb", "outputs": "emb", "target": "emb",
    "token": "token", "tokens": "token", "prompt": "token", "history": "history",
    "subscription": "subscription", "stream": "stream", "child": "child",
}  # fmt: skip
_EXCEPTIONS: Final = {
    (abi.CopyKvPage, "target"): "kv",
    (abi.AllocKvPage, "pages"): "",  # counts
    (abi.ShareKvPage, "pages"): "",
    (abi.DeallocKvPage, "pages"): "",
}
# the field with the handle that a command makes; it is called as its kind
MAKES: Final[dict[type[Command], str]] = {
    abi.CreateQueue: "queue", abi.AllocKvPage: "kv", abi.ShareKvPage: "kv",
    abi.ImportKvPage: "kv", abi.AllocEmb: "emb", abi.Sample: "token", abi.AllocHistory: "history",
    abi.Subscribe: "subscription", abi.HttpGet: "stream", abi.HttpPost: "stream",
    abi.Spawn: "child",
}  # fmt: skip
_FREES: Final[dict[type[Command], str]] = {
    abi.DestroyQueue: "queue", abi.DeallocKvPage: "kv", abi.DeallocEmb: "emb",
    abi.DeallocToken: "token", abi.DeallocHistory: "history", abi.Unsubscribe: "subscription",
    abi.HttpClose: "stream", abi.EndChild: "child",
}  # fmt: skip


class Named(NamedTuple):
    kind: str
    handle: int


def kind_of(command: type[Command], field: str) -> str:
    """What that field holds handles of; empty if of nothing."""
    return _EXCEPTIONS.get((command, field), _KINDS.get(field, ""))


def made_by(command: AnyCommand) -> Named | None:
    kind = MAKES.get(type(command))
    return Named(kind, getattr(command, kind)) if kind is not None else None


def freed_by(command: AnyCommand) -> Named | None:
    """What is no more when it has worked."""
    kind = _FREES.get(type(command))
    if kind is None or (isinstance(command, abi.DeallocKvPage) and not _whole(command)):
        return None
    return Named(kind, getattr(command, kind))


def used_by(command: AnyCommand) -> Iterator[Named]:
    """Those that have to be there, those it frees too."""
    made = MAKES.get(type(command))
    for field in command.__struct_fields__:
        kind = kind_of(type(command), field)
        if kind and field != made:
            for handle in _handles(kind, getattr(command, field)):
                yield Named(kind, handle)


def _whole(command: abi.DeallocKvPage) -> bool:
    return command.first_page == 0 and command.pages is None


def _handles(kind: str, value: Any) -> Iterator[int]:
    match value:
        case None:
            return
        case int():
            yield value
        case tuple():  # a span, an index: its first item is the handle
            yield value[0]
        case list() if kind == "token":  # refs: ids, and handles as their bitwise complement
            yield from (~ref for ref in value if ref < 0)
        case list():
            for item in value:
                yield from _handles(kind, item)
