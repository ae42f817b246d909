"""Pages on their way between device and host memory, and places that were freed just now."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from inferlet import abi

from .controller_process import PAGE, ControllerProcess
from .controller_programs import KV, PROMPT, Q, chain, setup
from .controller_swapping import PAGES, TEXT, away, leave, nobody_ended, sleeper, takes, wakes


@pytest.fixture
def controller() -> Iterator[ControllerProcess]:
    """As much host memory as the device has. Each test must leave no page held, of either."""
    process = ControllerProcess(pages=PAGES, swap_pages=PAGES)
    yield process
    leave(process)
    process.close()


def test_pages_on_their_way_back_do_not_leave_with_the_same_step(
    controller: ControllerProcess,
) -> None:
    """A step moves pages out before others in. A fork asks for no step, so what it brings back can
    rest in the open one for long: here behind two of somebody else's."""
    seat, peer = sleeper(controller, 10)
    other, _ = sleeper(controller, 20)
    assert away(controller) == {seat: 10}
    controller.release(other)
    _, busy = controller.admit()
    busy.put(*setup(PROMPT, 4 * PAGE), *chain(len(PROMPT), 8, 300, []))
    assert len(controller.collect()) == 2
    peer.put(abi.ShareKvPage(5, Q, 7, KV, 0, 2))
    assert peer.wait(5) is None and away(controller) == {}
    time.sleep(0.1)  # longer than one who has just come back is spared
    _, asker = controller.admit()
    asker.put(abi.CreateQueue(None, Q), abi.AllocKvPage(2, Q, KV, 16))
    assert len(controller.collect()) == 2
    assert controller.wait(asker, 2) is None
    assert away(controller) == {seat: 12}
    assert wakes(controller, peer) == TEXT
    nobody_ended(controller)


def test_room_that_the_dead_leave_in_host_memory_is_there_without_another_step(
    controller: ControllerProcess,
) -> None:
    dead, _ = sleeper(controller, PAGES)
    idle, peer = sleeper(controller, PAGES)
    assert away(controller) == {dead: PAGES}, "host memory is full"
    controller.release(dead)
    _, asker = controller.admit()
    takes(controller, asker, 10)
    assert away(controller) == {idle: PAGES}
    asker.put(abi.DestroyQueue(3, Q))
    assert asker.wait(3) is None
    assert wakes(controller, peer) == TEXT
    nobody_ended(controller)
