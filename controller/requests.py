"""What an inferlet asks of the controller, command by command as they arrive.

Commands of a queue are put on it; the others are done on the spot, by the handlers below and by
those of the modules that each keep one table: exports, topics, children, services, text.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from inferlet import abi
from inferlet.abi import AnyCommand
from inferlet.errors import HandleError, InferletError, QuotaError

from piehost.wire.control import Admit, ChildEnded, ControllerToHost, Reply, Sent

from .batcher import Batcher
from .chat import Text, check_model
from .children import Children
from .messaging import Topics
from .rates import Pace, split
from .seat import MAX_QUEUES, Seat, unused
from .services import Services
from .tables import Queue
from .turns import TURN_SECONDS
from .weights import MAX_QUEUED_BYTES

Handler = Callable[[Seat, Any], None]  # raises the InferletError that is the answer


class Requests:
    """Takes decoded frames. `send` takes messages to the host, `end` ends an inferlet for
    cause."""

    def __init__(
        self,
        batcher: Batcher,
        text: Text,
        send: Callable[[ControllerToHost], None],
        end: Callable[[Seat, InferletError], None],
    ) -> None:
        self._batcher = batcher
        self._send_to_host = send
        self._exports = batcher.machine.exports
        self._topics = Topics()
        self._services = Services(send, self._left)
        self._children = Children(self._services, end)
        self._now: dict[type[abi.Command], Handler] = {
            abi.Send: self._send,
            abi.Receive: self._receive,
            abi.CreateQueue: self._create_queue,
            abi.DestroyQueue: self._destroy_queue,
            abi.Cancel: self._cancel,
            abi.SetQueuePriority: self._set_queue_priority,
            **self._exports.handlers,
            **self._topics.handlers,
            **self._services.handlers,
            **self._children.handlers,
            **text.handlers,
        }

    # --- from the inferlet ----------------------------------------------------

    def take(
        self, seat: Seat, frames: list[list[AnyCommand]], began: float
    ) -> list[list[AnyCommand]]:
        """Carries out or queues the commands of frames; returns what is left for the next turn.
        `began`: the turn did, in seconds of `perf_counter`."""
        over = began + TURN_SECONDS
        for i, frame in enumerate(frames):
            done = self._take(seat, frame, over)
            if seat.closed:
                return []
            if done < len(frame):
                return [frame[done:], *frames[i + 1 :]]
            if time.perf_counter() > over:
                return frames[i + 1 :]
        return []

    def take_paced(
        self, seat: Seat, pace: Pace, frames: list[list[AnyCommand]], began: float
    ) -> tuple[list[list[AnyCommand]], list[list[AnyCommand]]]:
        """Takes as many as the inferlet's rate lets go now. Returns what is left of those, and what
        has to wait for the rate."""
        if pace.commands is None:
            return self.take(seat, frames, began), []
        frames, rest = split(frames, pace.commands.whole(time.monotonic()))
        left = self.take(seat, frames, began)
        pace.commands.take(sum(map(len, frames)) - sum(map(len, left)))
        return left, rest

    def _take(self, seat: Seat, frame: list[AnyCommand], over: float) -> int:
        """Returns how many commands of the frame it has got through."""
        touched: dict[Queue, None] = {}
        for i, command in enumerate(frame, 1):
            handler = self._now.get(type(command))
            if handler is None:
                self._put(seat, command, touched)
                continue
            self._arrived(touched)
            if seat.closed:
                return i
            try:
                handler(seat, command)
            except InferletError as error:
                seat.fail(command.req, error)
            if seat.closed or time.perf_counter() > over:
                return i
        self._arrived(touched)
        return len(frame)

    def _put(self, seat: Seat, command: Any, touched: dict[Queue, None]) -> None:
        target = seat.queues.get(command.queue)
        if target is None:
            seat.fail(command.req, _no_queue(command.queue))
        elif seat.queued >= seat.limits.commands or not seat.weights.add(command):
            refusal = _too_much_queued(seat)
            target.error = target.error or refusal
            seat.fail(command.req, refusal)
        else:
            target.commands.append(command)
            seat.queued += 1
            touched[target] = None

    def _arrived(self, touched: dict[Queue, None]) -> None:
        for queue in touched:
            self._batcher.arrived(queue)
        touched.clear()

    # --- from the host --------------------------------------------------------

    def admitted(self, seat: Seat, message: Admit) -> None:
        if message.parent:
            self._children.admitted(seat, message.child)

    def child_ended(self, message: ChildEnded) -> None:
        self._children.ended(message.child, message.code)

    def reply(self, message: Reply) -> None:
        self._services.reply(message)

    def forget(self, seat: Seat) -> None:
        """The inferlet has ended."""
        seat.inbox.drop()
        self._topics.forget(seat)
        self._children.forget(seat)
        self._services.forget(seat)

    # --- handlers -------------------------------------------------------------

    def _send(self, seat: Seat, c: abi.Send) -> None:
        if seat.link is not None:
            self._children.send_up(seat, seat.link, c.data)
        else:
            self._send_to_host(Sent(seat.number, c.data))
        seat.answer(c.req, None)

    @staticmethod
    def _receive(seat: Seat, c: abi.Receive) -> None:
        seat.inbox.receive(seat, c.req)

    @staticmethod
    def _create_queue(seat: Seat, c: abi.CreateQueue) -> None:
        check_model(c.model)
        unused(seat.queues, c.queue, "queue")
        if len(seat.queues) >= MAX_QUEUES:
            raise QuotaError(f"{MAX_QUEUES} queues are open", "destroy queues done with")
        seat.queues[c.queue] = Queue(seat)
        seat.answer(c.req, None)

    def _destroy_queue(self, seat: Seat, c: abi.DestroyQueue) -> None:
        queue = _queue(seat, c.queue)
        self._batcher.cancel(queue, "its queue was destroyed")
        self._batcher.forget([queue])
        self._batcher.machine.free_queue(seat, seat.queues.pop(c.queue))
        seat.answer(c.req, None)

    def _cancel(self, seat: Seat, c: abi.Cancel) -> None:
        self._batcher.cancel(_queue(seat, c.queue), "cancelled")
        seat.answer(c.req, None)

    @staticmethod
    def _set_queue_priority(seat: Seat, c: abi.SetQueuePriority) -> None:
        _queue(seat, c.queue).priority = c.priority
        seat.answer(c.req, None)

    def held(self, seat: Seat) -> dict[str, float]:
        """What it holds of the quotas that the controller keeps, by key."""
        return {
            "kv_pages": seat.pages_held,
            "embeds": seat.embeds_held,
            "tokens": len(seat.tokens),
            "commands": seat.queued,
            "history": seat.history_held,
            "export_pages": self._exports.pages(seat.user),
            "subscriptions": len(seat.subscriptions),
            "http_streams": len(seat.streams),
        }

    def _left(self, seat: Seat) -> dict[str, float]:
        """What is left of them."""
        held = self.held(seat).items()
        return {key: float(max(getattr(seat.limits, key) - number, 0)) for key, number in held}


def _queue(seat: Seat, handle: int) -> Queue:
    queue = seat.queues.get(handle)
    if queue is None:
        raise _no_queue(handle)
    return queue


def _too_much_queued(seat: Seat) -> QuotaError:
    if seat.queued >= seat.limits.commands:
        return QuotaError(
            f"{seat.queued} commands wait; the cap is {seat.limits.commands}",
            "wait for answers, or launch with a larger --quota commands",
        )
    return QuotaError(
        f"{seat.queued} commands wait, whose arrays and bin take more than {MAX_QUEUED_BYTES} "
        "octets with one more",
        "wait for answers before queueing more large ones",
    )


def _no_queue(handle: int) -> HandleError:
    return HandleError(f"no queue has handle {handle}", "create_queue it first")
