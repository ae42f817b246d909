"""KV pages of inferlets that pause, or have to give way, go to host memory and come back: no answer
differs, nothing is lost, and only when host memory is full too does anybody end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from inferlet import abi, errors

from piehost.wire import control
from piehost.wire.step import StepDone

from .controller_answers import settle
from .controller_process import PAGE, VOCAB, AnswerError, ControllerProcess, Peer
from .controller_programs import EMB, KV, OUT, PROMPT, SHARED, TOK, Q, chain, export, go_on, setup
from .toy_device import greedy, next_token

PAGES, PLACES = 24, 64


@pytest.fixture
def controller() -> Iterator[ControllerProcess]:
    """Each test must leave no page held, of either memory."""
    process = ControllerProcess(pages=PAGES, swap_pages=PLACES)
    yield process
    leave(process)
    process.close()


def leave(controller: ControllerProcess) -> None:
    """Ends all inferlets: every counter is back where it began."""
    while controller.collect():
        controller.serve()
    for seat in controller.stats().seats:
        controller.release(seat)
    total = controller.stats().total
    assert (total.pages_free, total.swap_free) == (total.pages_total, total.swap_total)
    assert (total.rows_free, total.seats) == (256, 0)


def nobody_ended(controller: ControllerProcess) -> None:
    settle(controller)
    assert not [m for m in controller.inbox if isinstance(m, control.End)]


# --- who gives way ------------------------------------------------------------


def sleeper(controller: ControllerProcess, pages: int, **admit: Any) -> tuple[int, Peer]:
    """An inferlet that holds `pages` pages, has run PROMPT in the first two, and waits."""
    seat, peer = controller.admit(**admit)
    peer.put(*setup(PROMPT, pages * PAGE), abi.Synchronize(1, Q))
    assert controller.wait(peer, 1) is None
    return seat, peer


def wakes(controller: ControllerProcess, peer: Peer, count: int = 4) -> list[int]:
    """Goes on where `sleeper` left off."""
    start = 200 + peer.request()
    peer.put(*chain(len(PROMPT), count, start, []))
    return [controller.wait(peer, start + i) for i in range(count)]


def takes(controller: ControllerProcess, peer: Peer, pages: int) -> None:
    peer.put(abi.CreateQueue(None, Q), abi.AllocKvPage(2, Q, 2, pages))
    assert controller.wait(peer, 2) is None


def away(controller: ControllerProcess) -> dict[int, int]:
    """By seat: pages in host memory."""
    seats = controller.stats().seats
    return {n: s.swapped_pages for n, s in seats.items() if s.swapped_pages}


TEXT = greedy(PROMPT, 4, VOCAB)


def test_who_holds_all_pages_and_sleeps_holds_up_nobody(controller: ControllerProcess) -> None:
    seat, first = sleeper(controller, PAGES)
    others = [sleeper(controller, 8)[1] for _ in range(3)]
    assert controller.stats().seats[seat].kv_pages == PAGES, "they count as held"
    assert away(controller) == {seat: PAGES}
    for peer in (others[1], first, others[0], others[2]):
        assert wakes(controller, peer) == TEXT
    nobody_ended(controller)


def test_the_lowest_priority_goes_first_then_the_longest_idle(
    controller: ControllerProcess,
) -> None:
    high, _ = sleeper(controller, 6, rates=control.Rates(priority=1))
    old, _ = sleeper(controller, 6)
    older, oldest = sleeper(controller, 6)
    low, _ = sleeper(controller, 6, rates=control.Rates(priority=-1))
    wakes(controller, oldest)  # now the longest idle of the two is `old`
    _, asker = controller.admit()
    for gone in ({low: 6}, {low: 6, old: 6}, {low: 6, old: 6, older: 6}):
        asker.put(abi.CreateQueue(None, Q), abi.AllocKvPage(2, Q, len(gone), 6))
        assert controller.wait(asker, 2) is None
        assert away(controller) == gone
    asker.put(abi.AllocKvPage(2, Q, 9, 6))
    assert controller.wait(asker, 2) is None
    assert high in away(controller)
    nobody_ended(controller)


def test_exports_of_the_dead_go_after_the_idle_and_before_the_busy(
    controller: ControllerProcess,
) -> None:
    dead, exporter = sleeper(controller, 8)
    export(exporter, pages=2, lease=1000)
    controller.release(dead)
    idle, _ = sleeper(controller, 6)
    busy = controller.admit()[1]
    busy.put(*setup(PROMPT, 10 * PAGE), *chain(len(PROMPT), 60, 300, []))
    controller.collect()
    _, asker = controller.admit()
    takes(controller, asker, 12)
    assert away(controller) == {idle: 6}
    assert len(asker.ask(abi.ListExported(8))) == 1
    asker.put(abi.AllocKvPage(3, Q, 3, 2))
    assert controller.wait(asker, 3) is None
    assert asker.ask(abi.ListExported(9)) == []
    assert away(controller) == {idle: 6}
    nobody_ended(controller)


def test_a_newer_one_gives_way_with_all_it_has_queued(controller: ControllerProcess) -> None:
    """The older one's pages come from under a chain of a hundred tokens."""
    _, older = sleeper(controller, 14)
    newer, young = controller.admit()
    young.put(*setup(PROMPT, 20 * PAGE), *chain(len(PROMPT), 100, 300, []))
    controller.collect()
    controller.serve(3)
    assert newer not in away(controller)
    older.put(*chain(len(PROMPT), 40, 300, []))
    assert controller.wait(older, 300) == TEXT[0]
    stats = controller.stats().seats[newer]
    assert (stats.kv_pages, stats.swapped_pages, stats.waits_for) == (20, 20, "pages")
    for peer, count in ((older, 40), (young, 100)):
        for i, token in enumerate(greedy(PROMPT, count, VOCAB)):
            assert (peer, i) == (older, 0) or controller.wait(peer, 300 + i) == token
    nobody_ended(controller)


def test_the_newest_waits_for_older_ones_that_work(controller: ControllerProcess) -> None:
    _, older = controller.admit()
    older.put(*setup(PROMPT, 20 * PAGE), *chain(len(PROMPT), 30, 300, []))
    controller.collect()
    seat, newest = controller.admit()
    newest.put(*setup(PROMPT, 8 * PAGE), *chain(len(PROMPT), 4, 300, []))
    controller.collect()
    controller.serve(10)
    controller.collect()
    stats = controller.stats().seats[seat]
    assert (stats.waits_for, stats.kv_pages, stats.steps) == ("pages", 0, 0)
    assert [controller.wait(newest, 300 + i) for i in range(4)] == TEXT
    assert [older.wait(300 + i) for i in range(30)] == greedy(PROMPT, 30, VOCAB)
    nobody_ended(controller)


def test_newer_ones_take_no_page_before_one_that_room_is_being_made_for(
    controller: ControllerProcess,
) -> None:
    (_, older), (_, young), (_, newest) = (controller.admit() for _ in range(3))
    young.put(*setup(PROMPT, 20 * PAGE), *chain(len(PROMPT), 30, 300, []))
    controller.collect()  # it gives way as soon as this is answered
    older.put(abi.CreateQueue(None, Q), abi.AllocKvPage(1, Q, KV, 20))
    controller.collect()
    newest.put(abi.CreateQueue(None, Q), abi.AllocKvPage(1, Q, KV, 4))
    controller.collect()
    assert newest.arrived() == [] and controller.stats().total.pages_free == 4
    assert controller.wait(older, 1) is None
    assert controller.wait(newest, 1) is None
    nobody_ended(controller)


def test_but_before_one_that_waits_for_others_to_pause_they_do(
    controller: ControllerProcess,
) -> None:
    (_, oldest), (_, older), (_, newest) = (controller.admit() for _ in range(3))
    oldest.put(*setup(PROMPT, 20 * PAGE), *chain(len(PROMPT), 30, 300, []))
    controller.collect()
    older.put(abi.CreateQueue(None, Q), abi.AllocKvPage(1, Q, KV, 10))
    controller.collect()
    newest.put(abi.CreateQueue(None, Q), abi.AllocKvPage(1, Q, KV, 4))
    controller.collect()
    assert newest.arrived() == [1] and older.arrived() == []
    assert controller.wait(older, 1) is None
    nobody_ended(controller)


def test_who_comes_back_does_some_work_before_it_goes_again(
    controller: ControllerProcess,
) -> None:
    """Two that pause after each token, and there is room for one: they do not take turns at
    every token."""
    peers = [sleeper(controller, 20)[1] for _ in range(2)]  # 160 slots
    count, text = 64, greedy(PROMPT, 64, VOCAB)
    before = controller.stats().total.swapped_in
    done = [-1, -1]
    while min(done) < count:
        for i, peer in enumerate(peers):
            if done[i] < count and (done[i] < 0 or 300 + done[i] in peer.arrived()):
                if done[i] >= 0:
                    assert peer.wait(300 + done[i]) == text[done[i]]
                done[i] += 1
                sample = abi.Sample(300 + done[i], Q, (OUT, 0), TOK)
                peer.put(sample, *chain(len(PROMPT) + done[i], 2, 0, [])[1:3])
        if min(done) < count:
            controller.collect()
            controller.serve(len(controller.waiting))
    turns = (controller.stats().total.swapped_in - before) / 20
    assert 2 <= turns <= count / 2, "not at every token of both"
    nobody_ended(controller)


def test_who_waits_for_one_just_back_needs_no_other_event(controller: ControllerProcess) -> None:
    peers = [sleeper(controller, 20)[1] for _ in range(2)]
    for i, peer in enumerate([*peers, *peers, *peers]):
        peer.put(abi.CopyKvPage(300 + i, Q, (KV, 0, 1), (KV, 30, 1)))
        assert controller.wait(peer, 300 + i) is None
    assert controller.stats().total.swapped_in >= 100
    nobody_ended(controller)


def test_when_host_memory_is_full_too_the_newest_is_ended_and_told_so(
    controller: ControllerProcess,
) -> None:
    hoarders = [sleeper(controller, pages)[0] for pages in (24, 24, 24, 16)]
    assert controller.stats().total.swap_free == 0
    _, asker = controller.admit()
    asker.put(*setup(PROMPT, PAGE))
    end = controller.from_host(control.End)
    assert (end.seat, end.code) == (hoarders[-1] + 1, "out_of_memory"), "itself, the newest"
    assert "host memory" in end.message and "--swap-pages" in end.hint
    controller.release(end.seat)
    first = controller._peers[0]
    first.put(*chain(len(PROMPT), 4, 300, []))  # an older one wants back
    assert controller.from_host(control.End).seat == hoarders[-1]
    assert [controller.wait(first, 300 + i) for i in range(4)] == TEXT


# --- what stays right ---------------------------------------------------------


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
