"""Whoever asks much of the controller waits while the accelerator works for others."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest
from inferlet import abi

from .controller_process import AnswerError, ControllerProcess, Peer
from .controller_programs import OUT, SPIN, TOK, Q, chats, setup

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
    while process.status() != psutil.STATUS_SLEEPING:
        pass
    return sum(request < CHATS for request in hog.arrived())


def test_it_is_held_up_until_the_accelerator_has_nothing_to_do(
    controller: ControllerProcess,
) -> None:
    number, hog = controller.admit()
    peer = controller.admit()[1]
    generate(controller, peer)
    hog.sock.sendall(chats(CHATS))
    assert answered_when_idle(controller, hog) < CHATS
    assert controller.stats().seats[number].waits_for == "turn"
    assert peer.ask(abi.Tokenize(1, 0, "w1")) == [1]
    controller.serve()
    wait_for_chat(hog, CHATS - 1)


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
    hog.sock.sendall(chats(1, first=CHATS))
    wait_for_chat(hog, CHATS)


def test_it_can_be_ended_meanwhile(controller: ControllerProcess) -> None:
    number, hog = controller.admit()
    peer = controller.admit()[1]
    generate(controller, peer)
    hog.sock.sendall(chats(CHATS))
    assert answered_when_idle(controller, hog) < CHATS
    hog.sock.close()
    assert controller.release(number).stats.commands == CHATS
