"""Random programs on the real controller, compared with `sequential.py` answer by answer.

Steps are answered at random moments, so that none, one or two are in flight. A round is a burst of
commands on one or two queues with handles of their own; it ends when all is answered, perhaps after
a cancel or the queue's end. Ring in holds the same all through a round, and each command has a
place of its own in ring out.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .controller_process import ControllerProcess
from .random_play import Play

SEEDS, ROUNDS = 300, 8
PAGES = 64


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
    play.check_counters()
    shared.release(play.seat)
    total = shared.stats().total
    assert (total.pages_free, total.rows_free, total.seats) == (PAGES, 256, 0)
