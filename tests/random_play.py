"""A random program on the real controller, compared with `sequential.py` answer by answer."""

from __future__ import annotations

import copy
import random
from typing import Any

from inferlet import abi
from inferlet.errors import CancelledError

from .controller_process import AnswerError, ControllerProcess
from .random_programs import LIMITED, Program
from .sequential import FREEING, Expected
from .sequential_memory import QueueState


class Play:
    """One program on the controller and on the reference."""

    def __init__(self, controller: ControllerProcess, seed: int) -> None:
        self.controller = controller
        self.program = Program(seed)
        self.random = random.Random(-seed - 1)
        self.seat, self.peer = controller.admit(**LIMITED)
        self.ring_in = controller.device.rings_in[self.seat]
        self.ring_out = controller.device.rings_out[self.seat]
        for queue in (1, 2):
            self.open(queue)

    def open(self, queue: int) -> None:
        self.peer.ask(abi.CreateQueue(1 << 30, queue))
        self.program.state.queues[queue] = QueueState()

    def round(self) -> None:
        self.begin()
        self.finish()

    def begin(self) -> None:
        """Sends a round's commands."""
        if self.random.random() < 0.3:  # what came out goes in again
            self.program.state.ring_in = (
                bytes(self.ring_out[:512]) + self.program.state.ring_in[512:]
            )
        self.ring_in[:] = self.program.state.ring_in
        self.before = copy.deepcopy(self.program.state)
        self.bursts = self.program.round()
        self.end: Any = None
        if self.program.alone and self.random.random() < 0.4:
            self.end = self.random.choice([abi.Cancel(1 << 31, 1), abi.DestroyQueue(1 << 31, 1)])
        self.send(self.bursts)

    def finish(self) -> None:
        """Waits for all answers and checks them."""
        bursts, end = self.bursts, self.end
        if end is not None:
            self.controller.wait(self.peer, self.request(end))
        answers = {c.req: self.answer(c.req) for burst in bursts.values() for c, _ in burst}
        for queue, burst in bursts.items():
            requests = {c.req for c, _ in burst}
            order = [request for request in self.peer.order if request in requests]
            assert order == [c.req for c, _ in burst], f"queue {queue} answers in order"
        if end is not None:
            self.program.state = self.before
            bursts[1] = self.cut([c for c, _ in bursts[1]], answers)
        for burst in bursts.values():
            for command, expected in burst:
                self.check(command, answers, expected)
        state = self.program.state
        if isinstance(end, abi.DestroyQueue):
            state.destroy(1)
            self.open(1)
        if state.spoilt:  # start anew
            for queue in (1, 2):
                self.controller.wait(self.peer, self.request(abi.DestroyQueue(1 << 31, queue)))
                state.destroy(queue)
                self.open(queue)
            state.spoilt = False

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
            freeing = isinstance(c, FREEING)
            answer = answers[c.req]
            if isinstance(answer, AnswerError) and answer.code == CancelledError.code:
                assert not freeing
                if not cancelled and isinstance(c, abi.Forward) and c.inputs[2] > 16:
                    self.program.state.spoilt = True  # part of it may have run
                cancelled = True
            else:
                assert freeing or not cancelled, "what is behind a cancelled one is cancelled too"
                done.append((c, self.program.state.run(c)))
        return done

    def check_counters(self) -> None:
        counters, state = self.controller.stats().seats[self.seat], self.program.state
        assert (counters.embeds, counters.queued) == (state.embeds_held, 0)
        assert counters.kv_pages == state.pages_held

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
            if expected.ring is not None:
                offset, octets = expected.ring
                assert self.ring_out[offset : offset + len(octets)] == octets, got
