"""What the host is told of the controller and its inferlets. Only reckoned when somebody asks."""

from __future__ import annotations

import time
from collections.abc import Container, Mapping

from piehost.wire import control

from .batcher import Batcher
from .requests import Requests
from .seat import Seat
from .waiting import waits_for


def report(
    asked: control.AskStats,
    seats: Mapping[int, Seat],
    batcher: Batcher,
    requests: Requests,
    slowed: Container[Seat],
    held: Container[Seat],
) -> control.Stats:
    """`slowed`: those whose rate of commands holds them up; `held`: those who have had their share
    of the controller."""
    total, machine = batcher.stats, batcher.machine
    total.seats = len(seats)
    total.pages_free, total.pages_total = machine.pages.free, machine.pages.total
    total.rows_free, total.rows_total = machine.rows.free, machine.rows.total
    places = machine.swapping.places
    total.swap_free, total.swap_total = places.free, places.total
    total.swapped_out, total.swapped_in = machine.swapping.out, machine.swapping.back
    one = seats.get(asked.seat)
    wanted = seats if not asked.seat else {one.number: one} if one else {}
    now = time.monotonic()
    for seat in wanted.values():
        seat.count_slowed(now)
        seat.stats.waits_for = waits_for(seat, batcher, seat in slowed, seat in held)
        seat.stats.kv_pages = seat.pages_held
        seat.stats.swapped_pages = seat.swapped
        seat.stats.embeds = seat.embeds_held
        seat.stats.queued = seat.queued
    of_one = requests.held(one) if one else {}
    stats = {number: seat.stats for number, seat in wanted.items()}
    return control.Stats(asked.request, total, stats, of_one)
