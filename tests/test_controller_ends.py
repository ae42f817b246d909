"""What ends an inferlet, or what it waits for: no pages, its death, a failed step, answers left
unread, a lost backend. Everybody else goes on with correct output."""

from __future__ import annotations

import os

import pytest
from inferlet import abi, errors

from piehost.wire import control
from piehost.wire.step import StepDone

from . import controller_unharmed
from .controller_process import VOCAB, AnswerError, ControllerProcess
from .controller_programs import EMB, KV, OUT, TOK, Q, chain, setup
from .controller_unharmed import PREPARED, assert_generates, fwd
from .toy_device import greedy

shared, controller = controller_unharmed.shared, controller_unharmed.controller  # the fixtures


# --- pages run out ------------------------------------------------------------


def test_when_pages_run_out_the_newest_holder_is_ended(controller: ControllerProcess) -> None:
    old, first = controller.admit()
    _, second = controller.admit()
    new, third = controller.admit()
    for peer, pages in ((first, 40), (second, 40), (third, 40)):
        peer.put(abi.CreateQueue(None, Q))
        peer.ask(abi.AllocKvPage(1, Q, KV, pages))
    first.ask(abi.AllocKvPage(2, Q, 2, 20))
    end = controller.from_host(control.End)
    assert (end.seat, end.code) == (new, "out_of_memory")
    assert "40" in end.message and end.hint
    assert controller.stats().seats[old].kv_pages == 60
    assert_generates(controller)


def test_when_the_newest_asks_it_is_ended_itself(controller: ControllerProcess) -> None:
    _, first = controller.admit(kv_pages=100)
    new, second = controller.admit(kv_pages=100)
    for peer in (first, second):
        peer.put(abi.CreateQueue(None, Q))
    first.ask(abi.AllocKvPage(1, Q, KV, 100))
    second.put(abi.AllocKvPage(1, Q, KV, 40))
    assert controller.from_host(control.End).seat == new
    first.ask(abi.Synchronize(2, Q))


def test_a_partly_freed_window_gives_its_pages_to_others(controller: ControllerProcess) -> None:
    _, first = controller.admit(kv_pages=128)
    _, second = controller.admit()
    first.put(abi.CreateQueue(None, Q))
    first.ask(abi.AllocKvPage(1, Q, KV, 128))
    first.ask(abi.DeallocKvPage(2, Q, KV, 10, 30))
    second.put(abi.CreateQueue(None, Q))
    second.ask(abi.AllocKvPage(1, Q, KV, 30))
    assert controller.stats().total.pages_free == 0
    assert not controller.inbox, "nobody was ended"


# --- ends and faults ----------------------------------------------------------


def test_an_inferlet_that_dies_mid_batch_hurts_nobody(controller: ControllerProcess) -> None:
    dying_seat, dying = controller.admit()
    _, living = controller.admit()
    for peer in (dying, living):
        peer.put(*setup([4, 5, 6], 64), *chain(3, 40, 100, []), abi.Synchronize(99, Q))
    controller.collect()
    controller.serve(3)
    dying.sock.close()
    controller.release(dying_seat)
    controller.wait(living, 99)
    assert [living.wait(100 + i) for i in range(40)] == greedy([4, 5, 6], 40, VOCAB)


def test_a_failed_step_is_an_error_for_those_in_it_and_no_more(
    controller: ControllerProcess,
) -> None:
    _, peer = controller.admit()
    peer.put(*PREPARED, abi.Sample(60, Q, (OUT, 0), TOK))
    controller.collect()
    step = controller.waiting.pop(0)
    controller.backend.send(StepDone(step.step, error="the accelerator ran out of memory"))
    with pytest.raises(AnswerError) as caught:
        peer.wait(60)
    assert caught.value.code == errors.BackendError.code
    assert "ran out of memory" in caught.value.message
    assert_generates(controller)


def test_cancel_drops_what_has_not_run_and_the_queue_goes_on(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    peer.put(*setup([1, 2, 3], 64), *chain(3, 40, 100, []))
    controller.collect()
    peer.ask(abi.Cancel(1, Q))
    controller.serve(2)
    cancelled = 0
    for i in range(40):
        try:
            assert controller.wait(peer, 100 + i) == greedy([1, 2, 3], 40, VOCAB)[i]
        except AnswerError as error:
            assert error.code == errors.CancelledError.code
            cancelled += 1
    assert cancelled == 38
    peer.put(abi.Synchronize(2, Q))
    assert controller.wait(peer, 2) is None


def test_destroying_a_queue_frees_what_was_made_through_it(controller: ControllerProcess) -> None:
    seat, peer = controller.admit()
    peer.put(*PREPARED, abi.Sample(60, Q, (OUT, 0), TOK))
    controller.wait(peer, 60)
    peer.ask(abi.DestroyQueue(1, Q))
    counters = controller.stats().seats[seat]
    assert (counters.kv_pages, counters.embeds, counters.queued) == (0, 0, 0)
    assert_generates(controller, peer)


def test_answers_left_unread_end_the_inferlet(controller: ControllerProcess) -> None:
    seat, peer = controller.admit()
    text = "w500 " * 6000  # 18,000 octets of answer
    for i in range(600):
        try:
            peer.put(abi.Tokenize(i, 0, text))
        except OSError:
            break
    end = controller.from_host(control.End, timeout=20)
    assert (end.seat, end.code) == (seat, "over_quota")
    assert_generates(controller)


def test_a_lost_backend_is_an_error_at_once_and_never_a_hang() -> None:
    controller = ControllerProcess()
    _, peer = controller.admit()
    peer.put(*PREPARED, abi.Sample(60, Q, (OUT, 0), TOK))
    controller.collect()
    controller.backend.close()
    with pytest.raises(AnswerError) as caught:
        peer.wait(60)
    assert caught.value.code == errors.BackendError.code
    controller.from_host(control.BackendLost)
    peer.put(abi.Synchronize(61, Q))
    with pytest.raises(AnswerError):
        peer.wait(61)
    peer.put(abi.EmbedTxt(None, Q, (EMB, 0), [1], 3), fwd(req=62))
    with pytest.raises(AnswerError) as caught:
        peer.wait(62)
    assert caught.value.code == errors.BackendError.code
    controller.host.close()
    assert controller.process.wait(5) == 0


def test_the_controller_holds_no_descriptor_of_the_dead(controller: ControllerProcess) -> None:
    before = len(os.listdir(f"/proc/{controller.process.pid}/fd"))
    for _ in range(50):
        seat, peer = controller.admit()
        peer.put(*PREPARED)
        peer.sock.close()
        controller.release(seat)
    assert len(os.listdir(f"/proc/{controller.process.pid}/fd")) == before


# --- messages -----------------------------------------------------------------


def test_messages_pass_both_ways_in_order(controller: ControllerProcess) -> None:
    seat, peer = controller.admit()
    peer.put(abi.Receive(1), abi.Send(None, b"one"), abi.Send(2, b"two"))
    assert [controller.from_host(control.Sent).data for _ in range(2)] == [b"one", b"two"]
    assert peer.wait(2) is None
    controller.host.send(control.Deliver(seat, b"first"))
    controller.host.send(control.Deliver(seat, b"second"))
    controller.host.send(control.CloseInput(seat))
    assert peer.wait(1) == b"first"
    assert peer.ask(abi.Receive(3)) == b"second"
    with pytest.raises(AnswerError) as caught:
        peer.ask(abi.Receive(4))
    assert caught.value.code == errors.ClosedError.code


def test_what_was_sent_before_the_end_still_arrives(controller: ControllerProcess) -> None:
    seat, peer = controller.admit()
    for i in range(50):
        peer.put(abi.Send(None, b"%d" % i))
    peer.sock.close()
    controller.host.send(control.Release(seat))
    got = [controller.from_host(control.Sent).data for _ in range(50)]
    assert got == [b"%d" % i for i in range(50)]
    controller.from_host(control.Released)
