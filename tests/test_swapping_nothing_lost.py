"""Pages that go to host memory and come back: no answer differs, nothing is lost."""

from __future__ import annotations

import pytest
from inferlet import abi, errors

from piehost.wire.step import StepDone

from . import controller_swapping
from .controller_answers import settle
from .controller_process import PAGE, VOCAB, AnswerError, ControllerProcess, Peer
from .controller_programs import EMB, KV, OUT, PROMPT, SHARED, TOK, Q, chain, export, go_on, setup
from .controller_swapping import (
    PAGES,
    PLACES,
    TEXT,
    away,
    leave,
    nobody_ended,
    sleeper,
    takes,
    wakes,
)
from .toy_device import greedy, next_token

controller = controller_swapping.controller  # the fixture


def test_forks_go_together_and_are_forks_still(controller: ControllerProcess) -> None:
    seat, peer = sleeper(controller, 10)
    peer.put(
        abi.ShareKvPage(None, Q, 7, KV, 0, 2),
        abi.ShareKvPage(None, Q, 8, 7, 1, 1),
        abi.Synchronize(3, Q),
    )
    assert controller.wait(peer, 3) is None
    takes(controller, controller.admit()[1], PAGES)
    total = controller.stats().total
    assert total.swap_total - total.swap_free == 10, "each page once"
    assert away(controller) == {seat: 13}
    peer.put(abi.DeallocKvPage(4, Q, 8))  # from where it is
    assert controller.wait(peer, 4) is None
    assert away(controller) == {seat: 12}
    assert refused_at_last(controller, peer, abi.CopyKvPage(5, Q, (KV, 0, 1), (7, 1, 1))) is (
        errors.SharedPageError
    )
    peer.put(abi.Synchronize(6, Q), abi.DeallocKvPage(7, Q, 7))
    assert controller.wait(peer, 7) is None
    assert wakes(controller, peer) == TEXT
    assert controller.stats().seats[seat].kv_pages == 10


@pytest.mark.parametrize(
    "command",
    [
        abi.ShareKvPage(5, Q, 7, KV, 0, 2),
        abi.ExportKvPage(5, Q, "a", [(KV, 0, 2)]),
        abi.CopyKvPage(5, Q, (KV, 0, 9), (KV, 30, 9)),
        abi.MaskKvPage(5, Q, (KV, 3, 1), False),
    ],
    ids=lambda command: type(command).__name__,
)
def test_whatever_touches_pages_brings_them_back_first(
    controller: ControllerProcess, command: abi.Command
) -> None:
    seat, peer = sleeper(controller, 10)
    takes(controller, controller.admit()[1], PAGES)
    assert away(controller) == {seat: 10}
    peer.put(command)
    assert controller.wait(peer, 5) is None
    assert seat not in away(controller)
    if not isinstance(command, abi.MaskKvPage):
        assert wakes(controller, peer) == TEXT
    if isinstance(command, abi.ExportKvPage):
        peer.put(abi.UnexportKvPage(9, "a"))
        assert controller.wait(peer, 9) is None


def test_pages_that_others_see_stay_where_they_are(controller: ControllerProcess) -> None:
    seat, exporter = sleeper(controller, 10, user="u")
    export(exporter, pages=2)
    _, importer = controller.admit(user="u")
    importer.put(abi.CreateQueue(None, 5), abi.ImportKvPage(1, 5, SHARED + 1, "a"))
    assert importer.wait(1) == [2, b"meta"]
    _, asker = controller.admit()
    takes(controller, asker, PAGES - 2)
    assert away(controller) == {seat: 8}
    asker.put(abi.DeallocKvPage(3, Q, 2, 0, 10))
    assert controller.wait(asker, 3) is None
    assert go_on(controller, importer, PROMPT, 3) == greedy([*PROMPT, 7], 3, VOCAB)
    assert wakes(controller, exporter) == TEXT
    exporter.put(abi.UnexportKvPage(9, "a"))
    assert controller.wait(exporter, 9) is None
    nobody_ended(controller)


def test_a_prompt_half_done_goes_on_in_other_pages() -> None:
    controller = ControllerProcess(pages=PAGES, swap_pages=PLACES, chunk=20)
    prompt = [(7 * i) % 50 for i in range(120)]
    _, older = sleeper(controller, 14)
    newer, young = controller.admit()
    young.put(*setup(prompt, 20 * PAGE), *chain(len(prompt), 5, 300, []))
    controller.collect()
    controller.serve(2)
    assert 0 < controller.stats().seats[newer].tokens_in < len(prompt)
    older.put(*chain(len(PROMPT), 30, 300, []))
    assert controller.wait(older, 300) == TEXT[0]
    assert away(controller)[newer] == 20
    older.put(abi.DeallocKvPage(3, Q, KV, 8, 6))  # so that the pages it gets are others
    assert controller.wait(older, 3) is None
    assert [controller.wait(young, 300 + i) for i in range(5)] == greedy(prompt, 5, VOCAB)
    nobody_ended(controller)
    leave(controller)
    controller.close()


def test_hidden_slots_stay_hidden_and_holes_holes(controller: ControllerProcess) -> None:
    answers = []
    for swapped in (False, True):
        _, peer = sleeper(controller, 20)
        peer.put(
            abi.MaskKvPage(None, Q, (KV, 3, 2), False),
            abi.CopyKvPage(None, Q, (KV, 0, 4), (KV, 40, 4)),
            abi.DeallocKvPage(None, Q, KV, 10, 5),
            abi.Synchronize(3, Q),
        )
        assert controller.wait(peer, 3) is None
        if swapped:
            seat, _ = sleeper(controller, 12)
            assert away(controller)
            controller.release(seat)
        peer.put(
            abi.Forward(None, Q, (EMB, 5, 1), [(KV, 0, 50)], (KV, 60, 1), (OUT, 0, 1), [30]),
            abi.Sample(4, Q, (OUT, 0), TOK),
        )
        answers.append(controller.wait(peer, 4))
        peer.put(abi.DestroyQueue(5, Q))
        assert controller.wait(peer, 5) is None
    assert answers[0] == answers[1]


def test_what_a_stop_undoes_is_undone_before_pages_move(controller: ControllerProcess) -> None:
    """Also when the queue that wrote is destroyed with its step in flight: the pages are another
    queue's."""
    first = greedy(PROMPT, 1, VOCAB)[0]
    seat, peer = controller.admit()
    peer.put(abi.CreateQueue(None, 2), abi.AllocKvPage(None, 2, 5, 20))
    peer.put(*setup(PROMPT, PAGE * 2), abi.Synchronize(1, Q))
    assert controller.wait(peer, 1) is None
    peer.put(
        abi.Sample(None, Q, (OUT, 0), TOK, stop=[first]),
        abi.EmbedTxt(None, Q, (EMB, 0), [~TOK], 16),
        abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, 16)], (5, 0, 1)),  # undone
    )
    controller.collect()
    controller.serve(1)
    controller.collect()
    peer.put(abi.DestroyQueue(3, Q))
    peer.wait(3)
    _, asker = controller.admit()
    asker.put(abi.CreateQueue(None, Q), abi.AllocKvPage(2, Q, 2, PAGES - 5))
    controller.collect()
    assert controller.wait(asker, 2) is None
    assert away(controller) == {seat: 20}
    controller.release(seat + 1)
    peer.put(
        abi.AllocEmb(None, 2, EMB, 1),
        abi.AllocEmb(None, 2, OUT, 1),
        abi.EmbedTxt(None, 2, (EMB, 0), [9], 20),
        abi.Forward(None, 2, (EMB, 0, 1), [(5, 0, 1)], (5, 4, 1), (OUT, 0, 1)),
        abi.Sample(4, 2, (OUT, 0), TOK),
    )
    assert controller.wait(peer, 4) == next_token(((20, 9),), VOCAB)


def test_a_failed_step_before_pages_move(controller: ControllerProcess) -> None:
    seat, peer = sleeper(controller, 10)
    peer.put(*chain(len(PROMPT), 2, 300, [])[:2], abi.Synchronize(3, Q))
    peer.put(abi.Forward(4, Q, (EMB, 0, 1), [(KV, 0, 16)], (KV, 16, 1), (OUT, 0, 1)))
    (step,) = controller.collect()
    controller.waiting.clear()
    controller.backend.send(StepDone(step.step, error="no memory"))
    settle(controller)
    while controller.collect():
        controller.serve()
    takes(controller, controller.admit()[1], PAGES)
    assert away(controller) == {seat: 10}
    peer.put(
        abi.Synchronize(None, Q),
        abi.EmbedTxt(None, Q, (EMB, 0), [PROMPT[-1]], len(PROMPT) - 1),
        abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, 15)], (KV, 15, 1), (OUT, 0, 1)),
        abi.Sample(5, Q, (OUT, 0), TOK),
    )
    assert controller.wait(peer, 5) == TEXT[0]


def test_cancel_and_the_end_of_a_queue_while_it_waits_for_pages(
    controller: ControllerProcess,
) -> None:
    _, older = controller.admit()
    older.put(*setup(PROMPT, 20 * PAGE), *chain(len(PROMPT), 30, 300, []))
    controller.collect()
    waiting = [controller.admit() for _ in range(3)]
    for _, peer in waiting:
        peer.put(abi.CreateQueue(None, Q), abi.AllocKvPage(1, Q, KV, 8), abi.Synchronize(2, Q))
    controller.collect()
    (_, cancels), (_, destroys), (dies, _) = waiting
    cancels.ask(abi.Cancel(3, Q))
    destroys.ask(abi.DestroyQueue(3, Q))
    controller.release(dies)
    for peer in (cancels, destroys):
        with pytest.raises(AnswerError) as caught:
            peer.wait(1)
        assert caught.value.code == errors.CancelledError.code
    _, newest = controller.admit()
    takes(controller, newest, 4)  # nobody it would have to wait for is left
    assert [controller.wait(older, 300 + i) for i in range(30)] == greedy(PROMPT, 30, VOCAB)


def test_more_pages_than_the_machine_has_with_what_is_shared_is_ones_own_error(
    controller: ControllerProcess,
) -> None:
    """Nobody else ends for pages that can never all come back."""
    seat, greedy_one = sleeper(controller, 20, user="u")
    _, exporter = sleeper(controller, 8, user="u")
    export(exporter, pages=8)
    assert away(controller) == {seat: 20}
    greedy_one.put(abi.ImportKvPage(5, Q, SHARED, "a"))
    assert controller.wait(greedy_one, 5)[0] == 8
    assert refused_at_last(controller, greedy_one, abi.MaskKvPage(6, Q, (KV, 0, 1), True)) is (
        errors.OutOfMemoryError
    )
    greedy_one.put(abi.DeallocKvPage(None, Q, SHARED), abi.Synchronize(7, Q))
    with pytest.raises(AnswerError):
        controller.wait(greedy_one, 7)
    exporter.put(abi.UnexportKvPage(9, "a"))
    assert wakes(controller, greedy_one) == TEXT
    nobody_ended(controller)


def refused_at_last(
    controller: ControllerProcess, peer: Peer, command: abi.Command
) -> type[errors.InferletError]:
    """The class of the error that the command is answered with, steps being served."""
    peer.put(command)
    assert command.req is not None
    with pytest.raises(AnswerError) as caught:
        controller.wait(peer, command.req)
    return errors.BY_CODE[caught.value.code]
