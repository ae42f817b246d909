"""Whoever asks much of the controller waits while the accelerator works for others."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest
from inferlet import abi

from piehost.wire import control

from .controller_answers import settle
from .controller_process import AnswerError, ControllerProcess, Peer
from .controller_programs import KV, OUT, SPIN, TOK, Q, chats, setup
from .host_harness import eventually

CHATS = 20  # of a tenth of a second of processor time each


@pytest.fixture
def controller() -> Iterator[ControllerProcess]:
    process = ControllerProcess(chat_template=SPIN)
    yield process
    process.close()


def generate(controller: ControllerProcess, peer: Peer) -> None:
    """One step of its own, which the accelerator does not answer."""
    peer.put(*setup([1, 2], 8), abi.Sample(500, Q, (OUT, 0), TOK))
    assert controller.collect()


def wait_for_chat(hog: Peer, request: int) -> None:
    with pytest.raises(AnswerError, match="to render"):
        hog.wait(request, timeout=60)


def answered_when_idle(controller: ControllerProcess, hog: Peer) -> int:
    """How many of the chats, when the controller does nothing any more."""
    wait_for_chat(hog, 0)
    process = psutil.Process(controller.process.pid)
    assert eventually(lambda: process.status() == psutil.STATUS_SLEEPING)
    return sum(request < CHATS for request in hog.arrived())


def waits_for(controller: ControllerProcess, number: int) -> str:
    return controller.stats().seats[number].waits_for


def test_it_is_held_up_until_the_accelerator_has_nothing_to_do(
    controller: ControllerProcess,
) -> None:
    number, hog = controller.admit()
    peer = controller.admit()[1]
    generate(controller, peer)
    hog.sock.sendall(chats(CHATS))
    assert answered_when_idle(controller, hog) < CHATS
    assert waits_for(controller, number) == "turn"
    assert peer.ask(abi.Tokenize(1, 0, "w1")) == [1]
    controller.serve()
    wait_for_chat(hog, CHATS - 1)


@pytest.mark.parametrize("share", [1, 100, 10_000])
def test_it_goes_on_slowly_while_others_are_served(
    controller: ControllerProcess, share: int
) -> None:
    hog = controller.admit(rates=control.Rates(share=share))[1]
    peer = controller.admit()[1]
    generate(controller, peer)
    hog.sock.sendall(chats(3))
    wait_for_chat(hog, 2)
    assert not peer.answered(500)


def test_it_is_not_for_a_step_of_its_own(controller: ControllerProcess) -> None:
    hog = controller.admit()[1]
    generate(controller, hog)
    hog.sock.sendall(chats(CHATS))
    assert answered_when_idle(controller, hog) == CHATS


def test_what_it_did_alone_is_not_held_against_it(controller: ControllerProcess) -> None:
    hog, peer = (controller.admit()[1] for _ in range(2))
    hog.sock.sendall(chats(CHATS))
    assert answered_when_idle(controller, hog) == CHATS
    generate(controller, peer)
    hog.put(abi.Tokenize(CHATS, 0, "w1"))
    settle(controller)
    assert CHATS in hog.arrived()


def test_a_child_has_what_its_parent_has_left(controller: ControllerProcess) -> None:
    parent, hog = controller.admit()
    child, other = controller.admit(parent=parent, child=1)
    peer = controller.admit()[1]
    generate(controller, peer)
    hog.sock.sendall(chats(1))
    wait_for_chat(hog, 0)
    other.sock.sendall(chats(1))
    settle(controller)
    assert waits_for(controller, child) == "turn"
    wait_for_chat(other, 0)


def test_what_a_held_one_leaves_waits_and_its_pages_do_not(controller: ControllerProcess) -> None:
    number, hog = controller.admit()
    peer = controller.admit()[1]
    generate(controller, peer)
    hog.put(abi.CreateQueue(None, Q), abi.AllocKvPage(None, Q, KV, 50))
    hog.sock.sendall(chats(CHATS))
    assert answered_when_idle(controller, hog) < CHATS
    held = controller.stats().total
    assert held.pages_total - held.pages_free > 50
    hog.sock.close()
    controller.host.send(control.Release(number))
    left = controller.stats().total
    assert left.pages_total - left.pages_free == 1
    assert not any(isinstance(message, control.Released) for message in controller.inbox)
    controller.serve()
    assert controller.from_host(control.Released).stats.commands == CHATS + 2
