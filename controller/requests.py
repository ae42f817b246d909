"""What an inferlet asks of the controller, command by command as they arrive.

Commands of a queue are put on it; the few others are done on the spot.
"""

from __future__ import annotations

from collections.abc import Callable

from inferlet import abi
from inferlet.abi import AnyCommand
from inferlet.errors import (
    ArgumentError,
    ClosedError,
    HandleError,
    InferletError,
    QuotaError,
)
from tokenizers import Tokenizer

from .batcher import Batcher
from .seat import MAX_QUEUES, Seat
from .tables import Queue


class Requests:
    """Takes decoded frames. `deliver` hands an inferlet's message to the host."""

    def __init__(
        self, batcher: Batcher, tokenizer: Tokenizer, deliver: Callable[[Seat, bytes], None]
    ) -> None:
        self._batcher = batcher
        self._tokenizer = tokenizer
        self._deliver = deliver

    def take(self, seat: Seat, frame: list[AnyCommand]) -> None:
        """Carries out or queues every command of one frame."""
        seat.stats.commands += len(frame)
        touched: dict[Queue, None] = {}
        for command in frame:
            if isinstance(command, _IMMEDIATE):
                for queue in touched:
                    self._batcher.arrived(queue)
                touched.clear()
                try:
                    self._now(seat, command)
                except InferletError as error:
                    seat.fail(command.req, error)
                if seat.closed:
                    return
                continue
            target = seat.queues.get(command.queue)
            if target is None:
                seat.fail(command.req, _no_queue(command.queue))
                continue
            if seat.queued >= seat.limits.commands:
                refusal = QuotaError(
                    f"{seat.queued} commands wait; the cap is {seat.limits.commands}",
                    "wait for answers, or launch with a larger --quota commands",
                )
                target.error = target.error or refusal
                seat.fail(command.req, refusal)
                continue
            target.commands.append(command)
            seat.queued += 1
            touched[target] = None
        for queue in touched:
            self._batcher.arrived(queue)

    def _now(self, seat: Seat, command: AnyCommand) -> None:
        match command:
            case abi.Send():
                self._deliver(seat, command.data)
                seat.answer(command.req, None)
            case abi.Receive():
                self._receive(seat, command.req)
            case abi.Tokenize():
                seat.answer(command.req, self._tokenize(command))
            case abi.CreateQueue():
                self._create_queue(seat, command)
            case abi.DestroyQueue():
                queue = _queue(seat, command.queue)
                self._batcher.cancel(queue, "its queue was destroyed")
                self._batcher.forget([queue])
                self._batcher.machine.free_queue(seat, seat.queues.pop(command.queue))
                seat.answer(command.req, None)
            case abi.Cancel():
                self._batcher.cancel(_queue(seat, command.queue), "cancelled")
                seat.answer(command.req, None)
            case abi.SetQueuePriority():
                _queue(seat, command.queue).priority = command.priority
                seat.answer(command.req, None)

    def _create_queue(self, seat: Seat, command: abi.CreateQueue) -> None:
        if command.model != 0:
            raise ArgumentError(f"there is no model {command.model}", "use one of `models`")
        if command.queue in seat.queues:
            raise HandleError(f"queue handle {command.queue} is in use", "choose another")
        if len(seat.queues) >= MAX_QUEUES:
            raise QuotaError(f"{MAX_QUEUES} queues are open", "destroy queues done with")
        seat.queues[command.queue] = Queue(seat, command.queue)
        seat.answer(command.req, None)

    def _receive(self, seat: Seat, request: int | None) -> None:
        if request is None:
            raise ArgumentError(
                "receive without a request id", "give one: the message is its answer"
            )
        if seat.messages:
            seat.hand_over(request, seat.messages.popleft())
        elif seat.input_open:
            if len(seat.receivers) >= seat.limits.commands:
                raise QuotaError(f"{len(seat.receivers)} receives wait", "wait for their messages")
            seat.receivers.append(request)
        else:
            raise no_more_input()

    def _tokenize(self, command: abi.Tokenize) -> list[int]:
        if command.model != 0:
            raise ArgumentError(f"there is no model {command.model}", "use one of `models`")
        size = len(command.text.encode())
        if size > abi.MAX_TOKENIZE_BYTES:
            raise ArgumentError(
                f"a text of {size} octets; the most is {abi.MAX_TOKENIZE_BYTES}",
                "tokenize it in parts, split where a token surely ends",
            )
        try:
            encoding = self._tokenizer.encode(command.text, add_special_tokens=command.special)
        except Exception as error:  # the library's only type; not every tokenizer takes any text
            raise ArgumentError(
                f"the model's tokenizer refuses this text: {error}", "leave out rare characters"
            ) from error
        ids: list[int] = encoding.ids
        if len(ids) > _MAX_IDS:
            raise ArgumentError(
                f"{len(ids)} tokens do not fit one answer ({_MAX_IDS})",
                "tokenize it in parts, split where a token surely ends",
            )
        return ids


def no_more_input() -> ClosedError:
    return ClosedError("the client will send no more messages", "stop receiving")


def _queue(seat: Seat, handle: int) -> Queue:
    queue = seat.queues.get(handle)
    if queue is None:
        raise _no_queue(handle)
    return queue


def _no_queue(handle: int) -> HandleError:
    return HandleError(f"no queue has handle {handle}", "create_queue it first")


_MAX_IDS = (abi.MAX_FRAME_BYTES - 64) // 5  # five octets an id at most
_IMMEDIATE = (
    abi.Send,
    abi.Receive,
    abi.Tokenize,
    abi.CreateQueue,
    abi.DestroyQueue,
    abi.Cancel,
    abi.SetQueuePriority,
)
