"""Random programs: commands that are mostly right, with what `sequential.py` answers to each."""

from __future__ import annotations

import copy
import random
import struct
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from inferlet import abi

from .controller_process import LIMITS, PAGE, VOCAB
from .sequential import MAX_CONTEXT, Reference
from .sequential_memory import STOPPED, Vector
from .toy_device import VECTOR_BYTES

LIMITED: dict[str, Any] = {"kv_pages": 20, "embeds": 110, "tokens": 5, "history": 25}
CAPS = [LIMITED[cap] for cap in ("kv_pages", "kv_pages", "embeds", "tokens", "history")]
RING = 65536
BAD_VECTORS, MASKS, NO_MASK = 16384, 32768, 60000  # places in ring in


class Program:
    """Makes one random program's commands, knowing the state that the reference is in."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        limits = abi.Limits(**{**msgspec.structs.asdict(LIMITS), **LIMITED})
        self.state = Reference(limits, PAGE, VOCAB)
        self.requests = 0
        self.out = 0  # octets of ring out given away in this round
        vectors = struct.pack("<4096f", *[self.random.randrange(-9, 9) for _ in range(4096)])
        bad = struct.pack("<4f", 1.0, float("nan"), 2.0, 3.0) * 1024
        masks = self.random.randbytes(NO_MASK - MASKS)
        self.state.ring_in = vectors + bad + masks + bytes(RING - NO_MASK)
        self.alone = True  # one queue in this round: caps and ends are in its order alone
        # pages, kv handles, embeds, tokens, tokens in histories: if nothing is freed
        self.most = [0] * len(CAPS)

    def round(self) -> dict[int, list[Any]]:
        """Commands by queue, and what the reference answers to each."""
        self.alone = self.random.random() < 0.5
        state, self.out = self.state, 0
        held = (state.pages_held, len(state.kvs), state.embeds_held, len(state.tokens))
        self.most = [*held, state.history_held]
        shares = {1: [*range(1, 7)]} if self.alone else self._halves()
        bursts: dict[int, list[Any]] = {}
        for queue, own in shares.items():
            bursts[queue] = []
            for _ in range(self.random.randrange(1, 30)):
                burst: Iterable[Any]
                if self.state.queues[queue].failed and self.random.random() < 0.7:
                    burst = [abi.Synchronize(0, queue)]
                elif self.random.random() < 0.4:
                    burst = self._step(queue, own)
                elif self.random.random() < 0.2:
                    burst = self._chain(queue, own)
                else:
                    burst = [self._command(queue, own)]
                for command in burst:
                    if self._allowed(command):
                        self.requests += 1
                        command.req = self.requests
                        bursts[queue].append((command, self.state.run(command)))
        return bursts

    def _halves(self) -> dict[int, list[int]]:
        """Handles for two queues; those that share pages stay together."""
        order = self.random.sample(range(1, 7), 6)
        first, rest = order[:3], order[3:]
        for _ in range(3):  # a share may have shares
            pages = set[int]().union(*map(self._pages, first))
            first += [handle for handle in rest if self._pages(handle) & pages]
            rest = [handle for handle in rest if handle not in first]
        return {1: first, 2: rest} if rest else {1: first}

    def _pages(self, handle: int) -> set[int]:
        kv = self.state.kvs.get(handle)
        return {id(page) for page in kv.pages if page is not None} if kv else set()

    def _allowed(self, c: Any) -> bool:
        """Two queues at once: caps must not be near, or the answer would be a matter of luck. Once
        ring in held something wrong, whether a token was sampled before it is freed is luck too,
        and what its queue holds when it goes on."""
        if self.state.spoilt and isinstance(c, abi.DeallocToken | abi.Synchronize):
            return False
        making = [0] * len(CAPS)
        if isinstance(c, abi.AllocKvPage | abi.ShareKvPage):
            making[:2] = [c.pages, 1]
        elif isinstance(c, abi.AllocEmb):
            making[2] = c.count
        elif isinstance(c, abi.Sample):
            making[3:] = [1, c.history is not None]
        elif isinstance(c, abi.AllocHistory):
            making[4] = len(c.prompt)
        elif isinstance(c, abi.ExtendHistory):
            making[4] = len(c.tokens)
        most = [a + b for a, b in zip(self.most, making, strict=True)]
        if not self.alone and any(a > b for a, b in zip(most, CAPS, strict=True)):
            return not any(making)
        self.most = most
        return True

    def _handle(self, own: list[int], table: dict[int, Any]) -> int:
        there = [h for h in own if h in table]
        return self.random.choice(there if there and self.random.random() < 0.93 else own)

    def _span(self, handle: int, size: int, most: int) -> tuple[int, int, int]:
        r = self.random
        if r.random() < 0.03:
            return (handle, r.randrange(size + 4), r.randrange(size + 4))
        first = r.choice([0, 0, r.randrange(max(size, 1))])
        return (handle, first, min(size - first, r.randrange(r.random() > 0.1, most + 1)))

    def _kv_span(self, own: list[int], most: int) -> tuple[int, int, int]:
        handle = self._handle(own, self.state.kvs)
        kv = self.state.kvs.get(handle)
        pages = kv.pages if kv else []
        if None in pages and self.random.random() < 0.9:  # look behind the freed ones
            first = (len(pages) - pages[::-1].index(None)) * PAGE
            _, at, length = self._span(handle, max(len(pages) * PAGE - first, 0), most)
            return (handle, first + at, length)
        return self._span(handle, len(pages) * PAGE, most)

    def _emb_span(self, own: list[int], most: int) -> tuple[int, int, int]:
        handle = self._handle(own, self.state.embs)
        emb = self.state.embs.get(handle)
        return self._span(handle, len(emb.entries) if emb else 3, most)

    def _output(self, own: list[int]) -> tuple[int, int]:
        """An embed, likely one that a forward filled."""
        there = [
            (h, i)
            for h in own
            if h in self.state.embs
            for i, entry in enumerate(self.state.embs[h].entries)
            if isinstance(entry, Vector) or entry is STOPPED
        ]
        return self.random.choice(there) if there else self._emb_span(own, 2)[:2]

    def _forward(self, q: int, own: list[int], inputs: tuple[int, int, int]) -> abi.Forward:
        r, (emb, first, n) = self.random, inputs
        reads = [self._kv_span(own, 24) for _ in range(r.choice([0, 1, 1, 2, 3]))]
        write: tuple[int, int, int] | None = None
        if r.random() < 0.8:
            handle, at, _ = self._kv_span(own, 24)
            reads = [s for s in reads if s[0] != handle or r.random() < 0.05]
            if r.random() < 0.5:  # the plain case: right behind what is read
                reads, at = [(handle, 0, at)], at
            write = (handle, at, n if r.random() < 0.97 else n + 1)
        outputs: tuple[int, int, int] | None = None
        if r.random() < 0.8:
            k = min(n, r.choice([1, 1, 2, n]))
            handle, at, _ = self._emb_span(own, 4)
            outputs = (emb, first + n - k, k) if r.random() < 0.3 else (handle, at, k)
        positions = None
        if r.random() < 0.15:
            positions = [r.randrange(60) for _ in range(n if r.random() < 0.95 else n + 1)]
        mask = None
        if r.random() < 0.15:
            columns = sum(s[2] for s in reads) + n
            mask = r.randbytes(n * ((columns + 7) // 8))
        return abi.Forward(0, q, inputs, reads, write, outputs, positions, mask)

    def _sample(self, q: int, own: list[int], emb: tuple[int, int]) -> abi.Sample:
        r = self.random
        c = abi.Sample(0, q, emb, self._handle(own, self.state.tokens), lazy=r.random() < 0.3)
        if r.random() < 0.4:
            self._control(c, own)
        if r.random() < 0.6:
            c.stop = [0, 1, *(self._hit(c) if r.random() < 0.3 else [])]
        return c

    def _hit(self, c: abi.Sample) -> list[int]:
        """The token that it will give, if it can."""
        held = self.state.embs.get(c.emb[0])
        entry = held.entries[c.emb[1]] if held and c.emb[1] < len(held.entries) else None
        known = c.history is None or c.history in self.state.histories
        if not (isinstance(entry, Vector) and known and all(t < VOCAB for t, _ in c.bias)):
            return []
        value = self.state.choose(c, entry)
        return [] if value is None else [value]

    def _control(self, c: abi.Sample, own: list[int]) -> None:
        r = self.random
        if r.random() < 0.3:
            places = [r.randrange(MASKS, NO_MASK - 125), NO_MASK, RING - 125, RING - 124]
            c.mask = r.choices(places, (40, 3, 1, 1))[0]
        if r.random() < 0.3:
            c.bias = [(r.randrange(VOCAB), r.choice([-400.0, 0.25, 900.0])) for _ in range(3)]
            c.bias += [(VOCAB, 1.0)] if r.random() < 0.03 else []
        if r.random() < 0.7:
            c.history = self._handle(own, self.state.histories)
            c.repetition_penalty = r.choice([1.0, 1.0, 2.0, 0.5])
            c.presence_penalty = r.choice([0.0, 0.0, 30.0, -600.0])
            c.frequency_penalty = r.choice([0.0, 0.0, 7.5, -80.0])
        if r.random() < 0.3:
            c.logprobs = True
        if r.random() < 0.2:
            c.k = r.choice([1, 5])
            c.offset = self._out(8 * c.k)

    def _out(self, size: int) -> int:
        """A place in ring out that no other command of the round uses, nearly always right."""
        self.out += size
        return self.random.choices([self.out - size, RING - size + 4, 3], (40, 1, 1))[0]

    def _embed(self, q: int, own: list[int]) -> abi.EmbedTxt:
        r = self.random
        handle, first, n = self._emb_span(own, r.choice([2, 40]))
        tokens = self._refs(own, n)
        where: int | list[int] = r.choice([0, first, first, r.randrange(60), r.randrange(60)])
        if r.random() < 0.05:
            where = MAX_CONTEXT - 2
        if r.random() < 0.2:
            where = [r.randrange(60) for _ in range(n)]
        return abi.EmbedTxt(0, q, (handle, first), tokens, where)

    def _refs(self, own: list[int], n: int) -> list[int]:
        r = self.random
        late = [~t for t in own if t in self.state.tokens]
        if r.random() < 0.03:
            late = [VOCAB, -99]
        return [
            r.choice(late) if late and r.random() < 2 / (n + 1) else r.randrange(50)
            for _ in range(n)
        ]

    def _step(self, q: int, own: list[int]) -> Iterator[Any]:
        """Embed, forward what was embedded, sample the last."""
        embed = self._embed(q, own)
        yield embed
        forward = self._forward(q, own, (*embed.target, len(embed.tokens)))
        yield forward
        if forward.outputs is not None and forward.outputs[2]:
            yield self._sample(q, own, (forward.outputs[0], sum(forward.outputs[1:]) - 1))

    def _chain(self, q: int, own: list[int]) -> Iterator[Any]:
        """Sample, embed that token, forward, and again: all with the same control."""
        r, state = self.random, self.state
        emb, kv, token = (self._handle(own, t) for t in (state.embs, state.kvs, state.tokens))
        pages = state.kvs[kv].pages if kv in state.kvs else []
        slot = r.randrange(max(len(pages) * PAGE - 6, 1))
        if r.random() < 0.8 and not any(h in state.histories for h in own):
            yield abi.AllocHistory(0, q, r.choice(own), self._refs(own, 3))
        yield abi.EmbedTxt(0, q, (emb, 0), [r.randrange(50)], 0)
        yield abi.Forward(0, q, (emb, 0, 1), [], (kv, slot, 1), (emb, 0, 1))
        control = self._sample(q, own, (emb, 0))
        control.token = token
        if control.history is None and r.random() < 0.5:
            self._control(control, own)
        for i in range(1, r.randrange(2, 6)):
            sample = copy.copy(control)
            if sample.k:
                sample.offset = self._out(8 * sample.k)
            yield sample
            if r.random() < 0.3:  # another one of the same, without offspring
                second = abi.Sample(0, q, (emb, 0), r.choice(own), history=sample.history)
                second.stop = r.choice([[], [0], self._hit(second)])
                yield second
            if sample.history is not None and r.random() < 0.2:
                refs = self._refs(own, r.choice([1, 3]))
                if r.random() < 0.5:
                    yield abi.DeallocHistory(0, q, sample.history)
                    yield abi.AllocHistory(0, q, sample.history, refs)
                else:
                    yield abi.ExtendHistory(0, q, sample.history, refs)
            if r.random() < 0.8:  # else the hidden state itself goes on
                yield abi.EmbedTxt(0, q, (emb, 0), [~sample.token], i)
            reads = [(kv, slot, i)] if r.random() < 0.7 else []
            yield abi.Forward(0, q, (emb, 0, 1), reads, (kv, slot + i, 1), (emb, 0, 1), [i])

    def _command(self, q: int, own: list[int]) -> Any:
        r = self.random
        emb, kv = self._emb_span(own, 30), self._kv_span(own, 12)
        if r.random() < 0.9:
            if not any(h in self.state.kvs for h in own):
                return abi.AllocKvPage(0, q, r.choice(own), r.choice([1, 2, 5]))
            if not any(h in self.state.embs for h in own):
                return abi.AllocEmb(0, q, r.choice(own), r.choice([3, 20, 40]))
        weights = (6, 2, 3, 3, 2, 6, 1, 1, 4, 5, 3, 2, 3, 3, 3, 2, 1)
        match r.choices(range(17), weights)[0]:
            case 0:
                return abi.AllocKvPage(0, q, r.choice(own), r.choice([0, 1, 1, 2, 4, 7]))
            case 1:
                first = r.randrange(4)
                pages = r.choice([None, 0, 1, 1, 2])
                return abi.DeallocKvPage(0, q, kv[0], 0 if pages is None else first, pages)
            case 2:
                source = self._handle(own, self.state.kvs)
                first, pages = r.randrange(3), r.choice([1, 1, 2])
                return abi.ShareKvPage(0, q, r.choice(own), source, first, pages)
            case 3:
                target = self._kv_span(own, 12)
                length = min(kv[2], target[2])
                return abi.CopyKvPage(0, q, (*kv[:2], length), (*target[:2], length))
            case 4:
                return abi.MaskKvPage(0, q, kv, r.random() < 0.5)
            case 5:
                return abi.AllocEmb(0, q, r.choice(own), r.choice([0, 1, 3, 20, 40]))
            case 6:
                return abi.DeallocEmb(0, q, emb[0])
            case 7:
                return abi.DeallocToken(0, q, self._handle(own, self.state.tokens))
            case 8:
                return self._embed(q, own)
            case 9:
                return self._forward(q, own, emb)
            case 10:
                return self._sample(q, own, self._output(own))
            case 11:
                k = r.choice([1, 9, 9, 0])
                return abi.GetNextDist(0, q, self._output(own), k, self._out(8 * k))
            case 12:
                return abi.ReadEmb(0, q, emb, self._out(VECTOR_BYTES * emb[2]))
            case 13:
                at = 4 * r.choices([r.randrange(3000), BAD_VECTORS // 4], (30, 1))[0]
                at = r.choices([at, RING - 12, 2], (40, 1, 1))[0]
                where: int | list[int] = r.randrange(60)
                if r.random() < 0.3:
                    where = [r.randrange(60) for _ in range(emb[2])]
                return abi.WriteEmb(0, q, emb, at, where)
            case 14:
                prompt = self._refs(own, r.choice([0, 1, 4, 20]))
                return abi.AllocHistory(0, q, r.choice(own), prompt)
            case 15:
                tokens = self._refs(own, r.choice([0, 1, 3]))
                return abi.ExtendHistory(0, q, self._handle(own, self.state.histories), tokens)
        return abi.DeallocHistory(0, q, self._handle(own, self.state.histories))
