"""Saved contexts: tokens and pages under a name, for every inferlet of the user in any language
(`docs/contexts.md`, the format).

A context is saved in parts of 16,384 tokens, each an export: the first is called NAME, the others
NAME#1, NAME#2 and so on.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .errors import ArgumentError, InferletError, NotFoundError, PositionError
from .exports import Imported, list_exported, unexport_kvpage
from .future import gather

if TYPE_CHECKING:
    from .cache import KvCache
    from .model import Model

PART_TOKENS = 16_384  # at 3 octets they fit into the meta of an export
_MAGIC, _VERSION = b"PIEC", 1
_HEADER = struct.Struct("<4sBIII")  # magic, version, parts, tokens, tokens written


class Part(NamedTuple):
    """The meta of one export."""

    parts: int
    length: int  # tokens of the whole context
    written: int  # of these, how many have keys and values
    tokens: list[int]  # those of this part


def part_name(name: str, part: int) -> str:
    return f"{name}#{part}" if part else name


def pack_part(part: Part) -> bytes:
    tokens = b"".join([token.to_bytes(3, "little") for token in part.tokens])
    return _HEADER.pack(_MAGIC, _VERSION, part.parts, part.length, part.written) + tokens


def unpack_part(name: str, meta: bytes) -> Part:
    """ArgumentError if `meta` is not that of a part of a saved context."""
    octets = len(meta) - _HEADER.size
    if octets < 0 or meta[:4] != _MAGIC or octets % 3:
        raise _not_saved(name, "its meta has another form")
    _, version, parts, length, written = _HEADER.unpack_from(meta)
    if version != _VERSION:
        raise _not_saved(name, f"its meta has version {version}, this is {_VERSION}")
    at = range(_HEADER.size, len(meta), 3)
    return Part(parts, length, written, [int.from_bytes(meta[i : i + 3], "little") for i in at])


def save(cache: KvCache, tokens: Sequence[int], name: str, lease: float | None) -> None:
    """Exports all of `tokens`, which must be written, and waits. ArgumentError if the name is taken
    or too long, QuotaError beyond `export_pages`; then nothing is saved."""
    length = len(tokens)
    starts = range(0, length, PART_TOKENS)
    exports = []
    for part in reversed(range(len(starts))):  # who sees the first part may import them all
        first, end = starts[part], min(length, starts[part] + PART_TOKENS)
        meta = pack_part(Part(len(starts), length, length, list(tokens[first:end])))
        spans = cache.slots.spans(first, end)
        what = part_name(name, part)
        exports.append((what, cache.queue.export_kvpage(what, spans, meta=meta, lease=lease)))
    try:
        for _, export in exports:
            export.result()
    except InferletError as error:
        with contextlib.suppress(InferletError):  # it is this one; the queue goes on
            cache.queue.synchronize().result()
        for what, export in exports:
            if export.error is None:
                unexport_kvpage(what).result()
        failed = next(what for what, export in exports if export.error is not None)
        raise _refused(name, failed, error) from None
    cache.slots.share(length)


def restore(cache: KvCache, name: str) -> list[int]:
    """Fills an empty `cache` with the context saved as `name`; gives its tokens. NotFoundError if
    a part is missing, ArgumentError if it is no saved context or of another model, PositionError
    if the model's context cannot hold it."""
    model = cache.model
    try:
        first = cache.queue.import_kvpage(name).result()
    except NotFoundError:
        raise _not_found(name) from None
    head = unpack_part(name, first.meta)
    if head.length > model.max_context:
        raise PositionError(
            f"{name!r} has {head.length} tokens, {model.name} holds {model.max_context}",
            "serve the model that it was saved with",
        )
    whole = head.length > 0 and head.parts == -(-head.length // PART_TOKENS)
    if not whole or head.written > head.length:
        raise _not_saved(name, "its meta does not add up")
    names = [part_name(name, part) for part in range(head.parts)]
    try:
        others = gather(*[cache.queue.import_kvpage(other) for other in names[1:]]).result()
    except NotFoundError:
        raise NotFoundError(
            f"a part of the saved context {name!r} is gone", f"unsave({name!r}), and save it again"
        ) from None
    tokens: list[int] = []
    for part, imported in enumerate([first, *others]):
        tokens += _checked_part(model, names[part], part, imported, head)
        written = min(max(0, head.written - part * PART_TOKENS), PART_TOKENS)
        if written:
            cache.slots.take(imported.kv, written)
    cache.written = head.written
    return tokens


def _checked_part(
    model: Model, name: str, number: int, imported: Imported, head: Part
) -> list[int]:
    """The tokens of part `number`, if it belongs to `head`."""
    part = unpack_part(name, imported.meta)
    first = number * PART_TOKENS
    if part[:3] != head[:3] or len(part.tokens) != min(PART_TOKENS, head.length - first):
        raise _not_saved(name, "it is of another context than its first part")
    if len(imported.kv) < min(PART_TOKENS, head.written - first):
        raise _not_saved(name, "it has too few pages")
    if max(part.tokens) >= model.vocab_size:
        raise _not_saved(name, f"it has tokens that {model.name} does not have")
    return part.tokens


def unsave(name: str) -> None:
    """Ends the saved context `name`: all its exports, by whichever inferlet of the user they were
    made. What was restored stays. NotFoundError if there is none."""
    try:
        unexport_kvpage(name).result()
    except NotFoundError:
        raise _not_found(name) from None
    prefix = f"{name}#"
    others = [export.name for export in list_exported(prefix).result()]
    parts = [other for other in others if other.removeprefix(prefix).isdigit()]
    for export in [unexport_kvpage(part) for part in parts]:
        with contextlib.suppress(NotFoundError):  # its lease has run out meanwhile
            export.result()


def _refused(name: str, part: str, error: InferletError) -> InferletError:
    """Why `save` could not export `part` of the context `name`, to who knows nothing of exports."""
    if isinstance(error, ArgumentError):
        return ArgumentError(
            f"the name {part!r} is taken by a saved context or an export",
            f"unsave({name!r}) first, or save it under another name",
        )
    return type(error)(error.message, error.hint.replace("unexport_kvpage", "unsave"))


def _not_found(name: str) -> NotFoundError:
    return NotFoundError(
        f"no saved context has the name {name!r}",
        "save it first, with a lease if it is to outlive the inferlet that saves it",
    )


def _not_saved(name: str, why: str) -> ArgumentError:
    return ArgumentError(
        f"{name!r} is no saved context of this model: {why}", "give a name that `save` was given"
    )
