"""A scripted model: what the commands of a queue do to pages, embeds, tokens and histories.

KV slots remember the token and position written to them, a hidden state is the list of what its
input attended to, and a sampled token is a function of that list.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from inferlet import abi
from inferlet.errors import (
    ArgumentError,
    HandleError,
    NotFoundError,
    QuotaError,
    SharedPageError,
    SpanError,
    UnwrittenError,
)

BOS, EOS = 256, 257
PIECES = [bytes([i]) for i in range(256)] + [b"<s>", b"</s>", "\u20ac".encode()[:2]]
VOCAB_SIZE = len(PIECES)
PAGE_SIZE = 8
MAX_CONTEXT = 400
RING_BYTES = 8192
RING_IN_BYTES = 4096
HIDDEN_SIZE = 4

History = tuple[tuple[int, int], ...]  # (position, token) of every slot attended, by position
STOPPED = "stopped"


def next_token(history: History) -> int:
    """A lower-case letter that depends on every attended token and its position."""
    state = 17
    for position, token in history:
        state = (state * 31 + 7 * position + token) % 1_000_003
    return 97 + state % 26


def continuation(
    tokens: Sequence[int], count: int, rule: Callable[[History], int] = next_token
) -> list[int]:
    """What greedy generation must give after `tokens`."""
    all_tokens = list(tokens)
    for _ in range(count):
        all_tokens.append(rule(tuple(enumerate(all_tokens))))
    return all_tokens[len(tokens) :]


@dataclass
class Page:
    holders: int = 1
    slots: list[tuple[int, int, bool] | None] = field(
        default_factory=lambda: [None] * PAGE_SIZE
    )  # (position, token, visible)


class Device:
    """Carries the commands of queues out; a method each."""

    def __init__(
        self,
        ring: mmap.mmap,
        limits: abi.Limits,
        rule: Callable[[History], int],
        ring_in: mmap.mmap | None,
    ) -> None:
        self.ring = ring
        self.ring_in = ring_in
        self.limits = limits
        self.rule = rule
        self.samples = 0
        self.kv: dict[int, list[Page | None]] = {}
        self.embs: dict[int, list[Any]] = {}
        self.tokens: dict[int, Any] = {}
        self.histories: dict[int, tuple[list[int], list[int]]] = {}  # (prompt, added)
        self.exports: dict[str, abi.ExportKvPage] = {}
        self.exported: dict[str, list[Page | None]] = {}
        self.owner: dict[tuple[str, int], int] = {}

    @property
    def pages_held(self) -> int:
        return len({id(p) for pages in self.kv.values() for p in pages if p is not None})

    def _AllocKvPage(self, c: abi.AllocKvPage) -> None:  # noqa: N802
        if self.pages_held + c.pages > self.limits.kv_pages:
            raise QuotaError(f"{c.pages} pages more than the cap", "free some")
        self._new("kv", c.kv, c.queue)
        self.kv[c.kv] = [Page() for _ in range(c.pages)]

    def _DeallocKvPage(self, c: abi.DeallocKvPage) -> None:  # noqa: N802
        if c.kv not in self.kv:
            raise HandleError(f"no kv {c.kv}", "free it once")
        if c.pages is None and c.first_page == 0:
            self._free("kv", c.kv)
            return
        end = len(self.kv[c.kv]) if c.pages is None else c.first_page + c.pages
        for i in range(c.first_page, end):
            page = self.kv[c.kv][i]
            if page is not None:
                page.holders -= 1
                self.kv[c.kv][i] = None

    def _ShareKvPage(self, c: abi.ShareKvPage) -> None:  # noqa: N802
        self._new("kv", c.kv, c.queue)
        self._slots((c.source, c.first_page * PAGE_SIZE, c.pages * PAGE_SIZE))
        pages = self.kv[c.source][c.first_page : c.first_page + c.pages]
        for page in pages:
            assert page is not None
            page.holders += 1
        self.kv[c.kv] = list(pages)

    def _CopyKvPage(self, c: abi.CopyKvPage) -> None:  # noqa: N802
        if c.source[2] != c.target[2]:
            raise SpanError("lengths differ", "make them equal")
        for (page, i), (target, j) in zip(
            self._slots(c.source), self._slots(c.target, write=True), strict=True
        ):
            target.slots[j] = page.slots[i]

    def _MaskKvPage(self, c: abi.MaskKvPage) -> None:  # noqa: N802
        for page, i in self._slots(c.span, write=True):
            slot = page.slots[i]
            if slot is not None:
                page.slots[i] = (slot[0], slot[1], c.visible)

    def _AllocEmb(self, c: abi.AllocEmb) -> None:  # noqa: N802
        self._new("emb", c.emb, c.queue)
        self.embs[c.emb] = [None] * c.count

    def _DeallocEmb(self, c: abi.DeallocEmb) -> None:  # noqa: N802
        if c.emb not in self.embs:
            raise HandleError(f"no emb {c.emb}", "free it once")
        self._free("emb", c.emb)

    def _DeallocToken(self, c: abi.DeallocToken) -> None:  # noqa: N802
        if c.token not in self.tokens:
            raise HandleError(f"no token {c.token}", "free it once")
        self._free("token", c.token)

    def _EmbedTxt(self, c: abi.EmbedTxt) -> None:  # noqa: N802
        handle, first = c.target
        embs = self._embs((handle, first, len(c.tokens)))
        for i, ref in enumerate(c.tokens):
            token = self.tokens[~ref] if ref < 0 else ref
            if isinstance(token, int) and token >= VOCAB_SIZE:
                raise ArgumentError(f"token {token}", "use a token of the vocabulary")
            position = c.positions + i if isinstance(c.positions, int) else c.positions[i]
            embs[first + i] = STOPPED if token == STOPPED else ("text", token, position)

    def _Forward(self, c: abi.Forward) -> None:  # noqa: N802
        _, first, count = c.inputs
        inputs = self._embs(c.inputs)[first : first + count]
        hidden = [STOPPED] * count if STOPPED in inputs else self._attend(c, inputs)
        if c.outputs:
            _, at, length = c.outputs
            self._embs(c.outputs)[at : at + length] = hidden[count - length :]

    def _attend(self, c: abi.Forward, inputs: list[Any]) -> list[Any]:
        if any(entry is None or entry[0] == "hidden" for entry in inputs):
            raise UnwrittenError("an input holds nothing", "embed_txt it")
        # a vector counts as a token that depends on its octets
        texts = [
            (position, what if kind == "text" else zlib.crc32(what) % 1000)
            for kind, what, position in inputs
        ]
        if c.positions is not None:
            texts = [(p, token) for p, (_, token) in zip(c.positions, texts, strict=True)]
        read = [page.slots[i] for span in c.reads for page, i in self._slots(span)]
        if c.write:
            slots = self._slots(c.write, write=True)
            if len(slots) != len(inputs):
                raise SpanError("the write has another length", "make them equal")
            for (page, i), (position, token) in zip(slots, texts, strict=True):
                page.slots[i] = (position, token, True)
        hidden: list[Any] = []
        width = (len(read) + len(texts) + 7) // 8
        for row, (position, _) in enumerate(texts):
            seen = []
            columns = [*read, *[(p, t, True) for p, t in texts]]
            for column, slot in enumerate(columns):
                if slot is None:
                    continue
                if c.mask is not None:
                    bit = c.mask[row * width + column // 8] >> (column % 8) & 1
                else:
                    bit = slot[2] and slot[0] <= position
                if bit:
                    seen.append((slot[0], slot[1]))
            hidden.append(("hidden", tuple(sorted(seen))))
        return hidden

    def _Sample(self, c: abi.Sample) -> object:  # noqa: N802
        entry = self._embs((*c.emb, 1))[c.emb[1]]
        self.samples += 1
        self.owner["token", c.token] = c.queue
        if entry == STOPPED:
            self.tokens[c.token] = STOPPED
            return None
        if entry is None or entry[0] != "hidden":
            raise UnwrittenError("no hidden state", "forward first")
        token = self._drawn(c, self.rule(entry[1]))
        self.tokens[c.token] = STOPPED if token in c.stop else token
        if c.history is not None and token not in c.stop:
            self.histories[c.history][1].append(token)
        if not c.logprobs and not c.k:
            return token
        self._write_dist(self.rule(entry[1]), c.k, c.offset)
        return [token, -float(token), c.k]

    def _drawn(self, c: abi.Sample, token: int) -> int:
        """`token`, or the next one that the bias, the penalties and the mask leave."""
        out = {t for t, added in c.bias if added < 0}
        if c.history is not None:
            prompt, added = self.histories[c.history]
            out |= set(prompt + added) if c.repetition_penalty > 1 else set()
            out |= set(added) if c.presence_penalty > 0 or c.frequency_penalty > 0 else set()
        if c.mask is not None:
            assert self.ring_in is not None
            bits = self.ring_in[c.mask : c.mask + -(-VOCAB_SIZE // 8)]
            out |= {t for t in range(VOCAB_SIZE) if not bits[t // 8] >> t % 8 & 1}
        while token in out:
            token = (token + 1) % VOCAB_SIZE
        return token

    def _GetNextDist(self, c: abi.GetNextDist) -> int | None:  # noqa: N802
        entry = self._embs((*c.emb, 1))[c.emb[1]]
        if entry == STOPPED:
            return None
        if entry is None or entry[0] != "hidden":
            raise UnwrittenError("no hidden state", "forward first")
        self._write_dist(self.rule(entry[1]), c.k, c.offset)
        return c.k

    def _write_dist(self, first: int, k: int, offset: int) -> None:
        ids = [(first + i) % VOCAB_SIZE for i in range(k)]
        probs = [2.0 ** -(i + 1) for i in range(k)]
        self.ring[offset : offset + 8 * k] = struct.pack(f"<{k}I{k}f", *ids, *probs)

    def _ReadEmb(self, c: abi.ReadEmb) -> int | None:  # noqa: N802
        _, first, count = c.emb
        entries = self._embs(c.emb)[first : first + count]
        if STOPPED in entries:
            return None
        size = 4 * HIDDEN_SIZE
        for i, entry in enumerate(entries):
            if entry is None:
                raise UnwrittenError("nothing there", "write it first")
            vector = entry[1] if entry[0] == "vector" else self.vector_of(entry)
            self.ring[c.offset + i * size : c.offset + (i + 1) * size] = vector
        return count

    @staticmethod
    def vector_of(entry: Any) -> bytes:
        """The octets of the vector of a text or a hidden state: some f32 that depend on it."""
        seed = zlib.crc32(repr(entry).encode())
        return struct.pack(f"<{HIDDEN_SIZE}f", *[(seed >> i & 0xFFFF) / 7 for i in range(4)])

    def _WriteEmb(self, c: abi.WriteEmb) -> None:  # noqa: N802
        assert self.ring_in is not None
        _, first, count = c.target
        embs, size = self._embs(c.target), 4 * HIDDEN_SIZE
        for i in range(count):
            position = c.positions + i if isinstance(c.positions, int) else c.positions[i]
            at = c.offset + i * size
            embs[first + i] = ("vector", bytes(self.ring_in[at : at + size]), position)

    def _AllocHistory(self, c: abi.AllocHistory) -> None:  # noqa: N802
        if c.history in self.histories:
            raise HandleError("in use", "choose another")
        self.owner["history", c.history] = c.queue
        self.histories[c.history] = (self._known_tokens(c.prompt), [])

    def _ExtendHistory(self, c: abi.ExtendHistory) -> None:  # noqa: N802
        if c.history not in self.histories:
            raise HandleError("no history", "alloc_history it")
        self.histories[c.history][1].extend(self._known_tokens(c.tokens))

    def _DeallocHistory(self, c: abi.DeallocHistory) -> None:  # noqa: N802
        self._free("history", c.history)

    def _known_tokens(self, refs: list[int]) -> list[int]:
        tokens = [self.tokens[~ref] if ref < 0 else ref for ref in refs]
        return [token for token in tokens if token != STOPPED]

    def _ExportKvPage(self, c: abi.ExportKvPage) -> None:  # noqa: N802
        if c.name in self.exports:
            raise ArgumentError("the name is in use", "unexport_kvpage it, or use another")
        held = sum(count for e in self.exports.values() for _, _, count in e.pages)
        if held + sum(count for _, _, count in c.pages) > self.limits.export_pages:
            raise QuotaError(f"more than the {held} exported", "unexport_kvpage what is done with")
        self.exports[c.name] = c
        self.exported[c.name] = [
            page for kv, first, count in c.pages for page in self.kv[kv][first : first + count]
        ]
        for page in self.exported[c.name]:
            assert page is not None
            page.holders += 1

    def _ImportKvPage(self, c: abi.ImportKvPage) -> list[Any]:  # noqa: N802
        if c.name not in self.exports:
            raise NotFoundError(f"no export {c.name!r}", "export_kvpage it first")
        self._new("kv", c.kv, c.queue)
        pages = self.exported[c.name]
        for page in pages:
            assert page is not None
            page.holders += 1
        self.kv[c.kv] = list(pages)
        return [len(pages), self.exports[c.name].meta]

    # --- tables ----------------------------------------------------------------------------

    def _new(self, kind: str, handle: int, queue: int) -> None:
        table = self.kv if kind == "kv" else self.embs
        if handle in table:
            raise HandleError(f"{kind} {handle} is in use", "choose another")
        self.owner[kind, handle] = queue

    def _free(self, kind: str, handle: int) -> None:
        del self.owner[kind, handle]
        if kind == "kv":
            for page in self.kv.pop(handle):
                if page is not None:
                    page.holders -= 1
        elif kind == "emb":
            del self.embs[handle]
        elif kind == "history":
            del self.histories[handle]
        else:
            del self.tokens[handle]

    def _embs(self, span: abi.Span) -> list[Any]:
        handle, first, length = span
        if handle not in self.embs:
            raise HandleError(f"no emb {handle}", "alloc_emb it")
        if first + length > len(self.embs[handle]):
            raise SpanError("beyond the embeds", "shorten the span")
        return self.embs[handle]

    def _slots(self, span: abi.Span, write: bool = False) -> list[tuple[Page, int]]:
        handle, first, length = span
        if handle not in self.kv:
            raise HandleError(f"no kv {handle}", "alloc_kvpage it")
        pages, slots = self.kv[handle], []
        for at in range(first, first + length):
            if at // PAGE_SIZE >= len(pages) or (page := pages[at // PAGE_SIZE]) is None:
                raise SpanError("beyond the pages", "shorten the span")
            if write and page.holders > 1:
                raise SharedPageError("another handle holds the page", "copy it")
            slots.append((page, at % PAGE_SIZE))
        return slots
