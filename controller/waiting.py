"""What an inferlet waits for now, in a word: see "What an inferlet waits for" in
docs/architecture.md, which lists them. Only reckoned when somebody asks."""

from __future__ import annotations

from .batcher import Batcher
from .seat import Seat


def waits_for(seat: Seat, batcher: Batcher, slowed: bool, held: bool) -> str:
    """`slowed`: its rate of commands holds it up; `held`: it had its share of the controller."""
    machine, queues = batcher.machine, seat.queues.values()
    if slowed or any(queue in batcher.slowed for queue in queues):
        return "rate"
    if machine.swapping.waits(seat):
        return "pages"
    if held or seat.in_line or any(queue in machine.held_up for queue in queues):
        return "turn"
    if any(queue.flight is not None for queue in queues):
        return "step"
    if any(queue.commands for queue in queues):
        return "share"
    if seat.asked:
        return "service"
    if seat.waiting:
        return "message"
    return ""
