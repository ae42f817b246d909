"""Random programs on the real controller, compared with `sequential.py` answer by answer.

Steps are answered at random moments, so that none, one or two are in flight. A round is a burst of
commands on one or two queues with handles of their own; it ends when all is answered, perhaps after
a cancel or the queue's end.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from inferlet import abi
from inferlet.errors import CancelledError

from .controller_process import LIMITS, PAGE, VOCAB, AnswerError, ControllerProcess
from .sequential import MAX_CONTEXT, STOPPED, Expected, QueueState, Reference
from .toy_device import next_token

SEEDS, ROUNDS = 300, 8
LIMITED = {"kv_pages": 20, "embeds": 110, "tokens": 5}
PAGES = 64


class Program:
    """Makes one random program's commands, knowing the state that the reference is in."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        limits = abi.Limits(**{**msgspec.structs.asdict(LIMITS), **LIMITED})
        self.state = Reference(limits, PAGE, VOCAB)
        self.requests = 0
        self.alone = True  # one queue in this round: caps and ends are in its order alone
        self.most = [0, 0, 0, 0]  # pages, kv handles, embeds, tokens: if nothing is freed

    def round(self) -> dict[int, list[Any]]:
        """Commands by queue, and what the reference answers to each."""
        self.alone = self.random.random() < 0.5
        state = self.state
        self.most = [state.pages_held, len(state.kvs), state.embeds_held, len(state.tokens)]
        shares = {1: [*range(1, 7)]} if self.alone else self._halves()
        bursts: dict[int, list[Any]] = {}
        for queue, own in shares.items():
            bursts[queue] = []
            for _ in range(self.random.randrange(1, 30)):
                if self.state.queues[queue].failed and self.random.random() < 0.7:
                    burst = [abi.Synchronize(0, queue)]
                elif self.random.random() < 0.4:
                    burst = self._step(queue, own)
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
        """Two queues at once: caps must not be near, or the answer would be a matter of luck."""
        making = [0, 0, 0, 0]
        if isinstance(c, abi.AllocKvPage | abi.ShareKvPage):
            making = [c.pages, 1, 0, 0]
        elif isinstance(c, abi.AllocEmb):
            making[2] = c.count
        elif isinstance(c, abi.Sample):
            making[3] = 1
        most = [a + b for a, b in zip(self.most, making, strict=True)]
        caps = [LIMITED["kv_pages"], LIMITED["kv_pages"], LIMITED["embeds"], LIMITED["tokens"]]
        if not self.alone and any(a > b for a, b in zip(most, caps, strict=True)):
            return making == [0, 0, 0, 0]
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
            if isinstance(entry, dict) or entry is STOPPED
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
        held = self.state.embs.get(emb[0])
        entry = held.entries[emb[1]] if held and emb[1] < len(held.entries) else None
        stop = [0, 1]
        if isinstance(entry, dict) and self.random.random() < 0.3:
            stop.append(next_token(entry["seen"], VOCAB))
        stops = stop if self.random.random() < 0.6 else []
        lazy = self.random.random() < 0.3
        return abi.Sample(0, q, emb, self._handle(own, self.state.tokens), stop=stops, lazy=lazy)

    def _embed(self, q: int, own: list[int]) -> abi.EmbedTxt:
        r = self.random
        handle, first, n = self._emb_span(own, r.choice([2, 40]))
        late = [~t for t in own if t in self.state.tokens]
        if r.random() < 0.03:
            late = [VOCAB, -99]
        tokens = [
            r.choice(late) if late and r.random() < 2 / (n + 1) else r.randrange(50)
            for _ in range(n)
        ]
        where: int | list[int] = r.choice([0, first, first, r.randrange(60), r.randrange(60)])
        if r.random() < 0.05:
            where = MAX_CONTEXT - 2
        if r.random() < 0.2:
            where = [r.randrange(60) for _ in range(n)]
        return abi.EmbedTxt(0, q, (handle, first), tokens, where)

    def _step(self, q: int, own: list[int]) -> Iterator[Any]:
        """Embed, forward what was embedded, sample the last."""
        embed = self._embed(q, own)
        yield embed
        forward = self._forward(q, own, (*embed.target, len(embed.tokens)))
        yield forward
        if forward.outputs is not None and forward.outputs[2]:
            yield self._sample(q, own, (forward.outputs[0], sum(forward.outputs[1:]) - 1))

    def _command(self, q: int, own: list[int]) -> Any:
        r = self.random
        emb, kv = self._emb_span(own, 30), self._kv_span(own, 12)
        if r.random() < 0.9:
            if not any(h in self.state.kvs for h in own):
                return abi.AllocKvPage(0, q, r.choice(own), r.choice([1, 2, 5]))
            if not any(h in self.state.embs for h in own):
                return abi.AllocEmb(0, q, r.choice(own), r.choice([3, 20, 40]))
        match r.choices(range(12), (6, 2, 3, 3, 2, 6, 1, 1, 4, 5, 3, 2))[0]:
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
        return abi.GetNextDist(
            0, q, self._output(own), r.choice([1, 9, 9, 0]), r.choice([0, 8, 8, 65532, 3])
        )


class Play:
    """One program on the controller and on the reference."""

    def __init__(self, controller: ControllerProcess, seed: int) -> None:
        self.controller = controller
        self.program = Program(seed)
        self.random = random.Random(-seed - 1)
        self.seat, self.peer = controller.admit(**LIMITED)
        for queue in (1, 2):
            self.open(queue)

    def open(self, queue: int) -> None:
        self.peer.ask(abi.CreateQueue(1 << 30, queue))
        self.program.state.queues[queue] = QueueState()

    def round(self) -> None:
        before = copy.deepcopy(self.program.state)
        bursts = self.program.round()
        end: Any = None
        if self.program.alone and self.random.random() < 0.4:
            end = self.random.choice([abi.Cancel(1 << 31, 1), abi.DestroyQueue(1 << 31, 1)])
        self.send(bursts)
        if end is not None:
            self.controller.wait(self.peer, self.request(end))
        answers = {c.req: self.answer(c.req) for burst in bursts.values() for c, _ in burst}
        for queue, burst in bursts.items():
            requests = {c.req for c, _ in burst}
            order = [request for request in self.peer.order if request in requests]
            assert order == [c.req for c, _ in burst], f"queue {queue} answers in order"
        if end is not None:
            self.program.state = before
            bursts[1] = self.cut([c for c, _ in bursts[1]], answers)
        for burst in bursts.values():
            for command, expected in burst:
                self.check(command, answers, expected)
        if isinstance(end, abi.DestroyQueue):
            before.destroy(1)
            self.open(1)

    def request(self, command: Any) -> int:
        self.peer.put(command)
        request: int = command.req
        return request

    def send(self, bursts: dict[int, list[Any]]) -> None:
        """In frames of random size, the queues' commands mingled, steps served now and then."""
        waiting = {queue: [c for c, _ in burst] for queue, burst in bursts.items() if burst}
        while waiting:
            frame = []
            for _ in range(self.random.choice([1, 5, 50])):
                queue = self.random.choice([*waiting])
                frame.append(waiting[queue].pop(0))
                if not waiting[queue]:
                    del waiting[queue]
                if not waiting:
                    break
            self.peer.put(*frame)
            steps = self.controller.collect()  # each time, so that a seed always plays the same
            self.controller.serve(self.random.randrange(len(steps) + 1))

    def answer(self, request: int) -> Any:
        try:
            return self.controller.wait(self.peer, request)
        except AnswerError as error:
            return error

    def cut(self, commands: list[Any], answers: dict[int, Any]) -> list[Any]:
        """Replays what was carried out before the queue's end; frees are carried out anyway."""
        cancelled = False
        done = []
        for c in commands:
            freeing = isinstance(c, abi.DeallocKvPage | abi.DeallocEmb | abi.DeallocToken)
            answer = answers[c.req]
            if isinstance(answer, AnswerError) and answer.code == CancelledError.code:
                cancelled = True
                assert not freeing
            else:
                assert freeing or not cancelled, "what is behind a cancelled one is cancelled too"
                done.append((c, self.program.state.run(c)))
        return done

    def check(self, command: Any, answers: dict[int, Any], expected: Expected) -> None:
        answer = answers[command.req]
        got = f"{command} answered {answer!r}, expected {expected}"
        if expected.codes:
            assert isinstance(answer, AnswerError) and answer.code in expected.codes, got
        elif expected.like is not None:
            first = answers.get(expected.like)  # absent: of an earlier round
            assert isinstance(answer, AnswerError), got
            assert first is None or answer.code == first.code, got
        else:
            assert answer == expected.value, got


@pytest.fixture(scope="module")
def shared() -> Iterator[ControllerProcess]:
    process = ControllerProcess(pages=PAGES, chunk=20)
    yield process
    process.close()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_answer_is_that_of_one_command_after_the_other(
    shared: ControllerProcess, seed: int
) -> None:
    for seat in shared.stats().seats:
        shared.release(seat)  # of a seed that failed
    play = Play(shared, seed)
    for _ in range(ROUNDS):
        play.round()
    counters, state = shared.stats().seats[play.seat], play.program.state
    assert (counters.embeds, counters.queued) == (state.embeds_held, 0)
    assert counters.kv_pages == state.pages_held
    shared.release(play.seat)
    total = shared.stats().total
    assert (total.pages_free, total.rows_free, total.seats) == (PAGES, 256, 0)
