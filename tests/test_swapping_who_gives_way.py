"""When pages run out: whose go to host memory, who waits for whom, who comes back when; and only
when host memory is full too does anybody end."""

from __future__ import annotations

from inferlet import abi

from piehost.wire import control

from . import controller_swapping
from .controller_process import PAGE, VOCAB, ControllerProcess
from .controller_programs import KV, OUT, PROMPT, TOK, Q, chain, export, setup
from .controller_swapping import PAGES, TEXT, away, nobody_ended, sleeper, takes, wakes
from .toy_device import greedy

controller = controller_swapping.controller  # the fixture


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
