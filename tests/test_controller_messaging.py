"""Topics: who hears what, in what order, and what a flood of messages does to whom."""

from __future__ import annotations

import select
from typing import Any

import pytest
from inferlet import abi, errors

from piehost.wire import control

from . import controller_fixtures
from .controller_answers import refused, settle
from .controller_process import VOCAB, AnswerError, ControllerProcess, Peer
from .controller_programs import OUT, TOK, Q, setup
from .toy_device import greedy

shared, controller = controller_fixtures.shared, controller_fixtures.emptied  # the fixtures

SUB = 1


def listen(peer: Peer, topic: str = "news", handle: int = SUB, job: bool = False) -> None:
    assert peer.ask(abi.Subscribe(peer.request(), handle, topic, job)) is None


def say(peer: Peer, data: bytes, topic: str = "news", job: bool = False) -> int:
    got: int = peer.ask(abi.Broadcast(peer.request(), topic, data, job))
    return got


def hear(peer: Peer, handle: int = SUB) -> Any:
    return peer.ask(abi.NextMessage(peer.request(), handle))


def many_listen(controller: ControllerProcess) -> None:
    """240 subscriptions to "flood": as many deliveries for each broadcast there."""
    for _ in range(15):
        _, peer = controller.admit()
        peer.put(*[abi.Subscribe(None, handle, "flood") for handle in range(1, 17)])


# --- who hears what -----------------------------------------------------------


def test_a_broadcast_reaches_the_user_s_subscriptions_and_the_sender_s_own(
    controller: ControllerProcess,
) -> None:
    sender, (_, other), (_, stranger) = (
        controller.admit(user="a"),
        controller.admit(user="a"),
        controller.admit(user="b"),
    )
    number, me = sender
    for peer in (me, other, stranger):
        listen(peer)
    listen(other, handle=2)
    listen(other, "news ", handle=3)
    assert say(me, b"hello") == 3
    for peer, handle in ((me, 1), (other, 1), (other, 2)):
        assert hear(peer, handle) == [b"hello", f"i{number}"]
    assert say(stranger, b"mine") == 1
    assert hear(stranger)[0] == b"mine", "the other user's message never came here"


def test_a_job_s_topic_is_apart_from_the_user_s(controller: ControllerProcess) -> None:
    _, one = controller.admit(user="a", job="j")
    _, two = controller.admit(user="a", job="k")
    _, namesake = controller.admit(user="b", job="j")
    for peer in (one, two, namesake):
        listen(peer, handle=1)
        listen(peer, handle=2, job=True)
    assert say(one, b"within", job=True) == 1
    assert hear(one, 2)[0] == b"within"
    assert say(two, b"to all") == 2
    assert hear(one, 1)[0] == hear(two, 1)[0] == b"to all"
    assert say(two, b"k's own", job=True) == 1
    assert hear(two, 2)[0] == b"k's own"


def test_messages_of_a_sender_keep_their_order_waited_for_or_not(
    controller: ControllerProcess,
) -> None:
    _, reader = controller.admit()
    _, writer = controller.admit()
    listen(reader)
    early = [reader.request() for _ in range(5)]
    reader.put(*[abi.NextMessage(request, SUB) for request in early])
    settle(controller)
    writer.put(*[abi.Broadcast(None, "news", b"%d" % i) for i in range(20)])
    settle(controller)
    heard = [reader.wait(request)[0] for request in early]
    heard += [hear(reader)[0] for _ in range(15)]
    assert heard == [b"%d" % i for i in range(20)]


def test_unsubscribe_ends_a_waiting_next_message_and_frees_the_handle(
    controller: ControllerProcess,
) -> None:
    _, peer = controller.admit()
    listen(peer)
    waiting = peer.request()
    peer.put(abi.NextMessage(waiting, SUB), abi.Unsubscribe(None, SUB))
    with pytest.raises(AnswerError) as caught:
        peer.wait(waiting)
    assert errors.BY_CODE[caught.value.code] is errors.ClosedError
    assert say(peer, b"nobody") == 0
    assert refused(peer, abi.NextMessage(peer.request(), SUB)) is errors.HandleError
    listen(peer)
    while say(peer, bytes(60000)):
        pass
    peer.put(abi.Unsubscribe(None, SUB))
    listen(peer)
    assert say(peer, b"again" + bytes(59000)) == 1
    assert hear(peer)[0][:5] == b"again", "what was sent before is not here"


def test_an_inferlet_that_ended_is_not_counted(controller: ControllerProcess) -> None:
    seat, gone = controller.admit()
    _, peer = controller.admit()
    listen(gone)
    controller.release(seat)
    assert say(peer, b"x") == 0


# --- wrong ------------------------------------------------------------------------


def test_wrong_commands_are_typed_errors(controller: ControllerProcess) -> None:
    _, peer = controller.admit(subscriptions=2)
    _, other = controller.admit()
    listen(other, handle=9)
    forged = refused(peer, abi.NextMessage(peer.request(), 9))
    assert forged is refused(peer, abi.Unsubscribe(peer.request(), 9)) is errors.HandleError
    listen(peer)
    assert refused(peer, abi.Subscribe(peer.request(), SUB, "t")) is errors.HandleError
    long = "\U0001f600" * 65
    assert refused(peer, abi.Subscribe(peer.request(), 2, long)) is errors.ArgumentError
    assert refused(peer, abi.Broadcast(peer.request(), long, b"")) is errors.ArgumentError
    listen(peer, handle=2)
    assert refused(peer, abi.Subscribe(peer.request(), 3, "t")) is errors.QuotaError
    peer.put(abi.NextMessage(None, SUB))
    assert say(peer, b"x") == 3
    assert hear(peer)[0] == b"x", "one without a request id takes no message"


def test_waiting_next_messages_have_a_cap(controller: ControllerProcess) -> None:
    _, peer = controller.admit(commands=10)
    listen(peer)
    waiting = [peer.request() for _ in range(10)]
    peer.put(*[abi.NextMessage(request, SUB) for request in waiting])
    assert refused(peer, abi.NextMessage(peer.request(), SUB)) is errors.QuotaError
    assert refused(peer, abi.Receive(peer.request())) is errors.QuotaError, "all kinds together"
    assert say(peer, b"x") == 1
    assert peer.wait(waiting[0])[0] == b"x"
    settle(controller)
    again = peer.request()
    peer.put(abi.NextMessage(again, SUB))
    settle(controller)
    for request in [*waiting[1:], again]:
        assert say(peer, b"%d" % request) == 1
        assert peer.wait(request)[0] == b"%d" % request


# --- who does not read --------------------------------------------------------


def test_what_does_not_fit_is_lost_and_its_place_says_so_once(
    controller: ControllerProcess,
) -> None:
    _, slow = controller.admit()
    _, fast = controller.admit()
    _, writer = controller.admit()
    listen(slow)
    listen(fast)
    data = bytes(50000)
    got = []
    for i in range(30):
        got.append(say(writer, data + b"%02d" % i))
        assert hear(fast)[0][-2:] == b"%02d" % i, "a fast one misses nothing"
    kept = got.index(1)
    assert 15 < kept <= (1 << 20) // 50000 and got == [2] * kept + [1] * (30 - kept)
    assert [hear(slow)[0][-2:] for _ in range(kept)] == [b"%02d" % i for i in range(kept)]
    assert refused(slow, abi.NextMessage(slow.request(), SUB)) is errors.LaggedError
    assert say(writer, b"after") == 2
    assert hear(slow)[0] == b"after"
    assert hear(fast)[0] == b"after"


def test_empty_messages_are_bounded_too_and_other_subscriptions_share_the_bound(
    controller: ControllerProcess,
) -> None:
    _, slow = controller.admit()
    number, writer = controller.admit()
    listen(slow)
    listen(slow, "other", handle=2)
    for _ in range(4):
        writer.put(*[abi.Broadcast(None, "news", b"")] * 2000)
    assert say(writer, b"", "other") == 0, "its inferlet has no room left"
    for _ in range(4096):
        slow.put(abi.NextMessage(7, SUB))
        assert slow.wait(7) == [b"", f"i{number}"]
    assert refused(slow, abi.NextMessage(slow.request(), SUB)) is errors.LaggedError
    assert refused(slow, abi.NextMessage(slow.request(), 2)) is errors.LaggedError
    assert say(writer, b"x", "other") == 1
    assert hear(slow, 2)[0] == b"x"


def test_one_that_waits_for_much_and_does_not_read_its_answers_costs_a_bounded_part(
    controller: ControllerProcess,
) -> None:
    """Sixteen subscriptions with a hundred waiting requests each: a broadcast of 60,000 octets
    would be a megabyte of answers, and twenty of them arrive in one turn."""
    seat, greedy = controller.admit()
    writers = [controller.admit()[1] for _ in range(20)]
    for handle in range(1, 17):
        listen(greedy, handle=handle)
    for handle in range(1, 17):
        greedy.put(*[abi.NextMessage(1000 * handle + i, handle) for i in range(100)])
    settle(controller)
    requests = []
    for writer in writers:
        requests.append(writer.request())
        writer.put(abi.Broadcast(requests[-1], "news", bytes(60000)))
    got = sum(writer.wait(r) for writer, r in zip(writers, requests, strict=True))
    assert 16 <= got < 16 * 20
    assert controller.stats().seats[seat].message_bytes < 3 << 20


def test_a_flood_of_broadcasts_holds_up_its_sender_alone(controller: ControllerProcess) -> None:
    """8,000 broadcasts to 240 subscriptions are two million deliveries, and fit into two frames:
    meanwhile others are served, and the flooder's own next command waits for its turn."""
    many_listen(controller)
    _, flooder = controller.admit()
    _, honest = controller.admit()
    settle(controller)
    for _ in range(2):
        flooder.put(*[abi.Broadcast(None, "flood", b"")] * 4000)
    flooder.put(abi.Broadcast(1, "nobody", b""))
    honest.put(*setup([1, 2], 8), abi.Sample(2, Q, (OUT, 0), TOK))
    assert controller.wait(honest, 2) is not None
    assert not _readable(flooder), "one turn after the other"
    assert flooder.wait(1, timeout=60) == 0


def _readable(peer: Peer) -> bool:
    return bool(select.select([peer.sock], [], [], 0)[0])


def test_the_rest_of_a_frame_goes_to_the_device_though_nothing_else_happens(
    controller: ControllerProcess,
) -> None:
    many_listen(controller)
    _, flooder = controller.admit()
    settle(controller)
    flooder.put(
        *[abi.Broadcast(None, "flood", b"")] * 1000,
        *setup([1, 2], 8),
        abi.Sample(2, Q, (OUT, 0), TOK),
    )
    assert controller.wait(flooder, 2) == greedy([1, 2], 1, VOCAB)[0]


def test_what_a_flooder_left_is_carried_out_in_turns_after_its_death(
    controller: ControllerProcess,
) -> None:
    many_listen(controller)
    seat, flooder = controller.admit()
    settle(controller)
    flooder.put(*[abi.Broadcast(None, "flood", b"")] * 4000)
    flooder.put(abi.Send(None, b"last words"))
    flooder.sock.close()
    released = controller.release(seat)
    assert released.stats.commands == 4001
    said = [m.data for m in controller.inbox if hasattr(m, "data") and m.seat == seat]
    assert said == [b"last words"], "and before its release"


def test_what_a_dead_flooder_held_is_free_before_its_last_words_are_through(
    controller: ControllerProcess,
) -> None:
    many_listen(controller)
    seat, flooder = controller.admit()
    settle(controller)
    flooder.put(abi.CreateQueue(None, Q), abi.AllocKvPage(1, Q, 1, 3))
    assert flooder.wait(1) is None
    assert controller.stats().total.pages_free == controller.stats().total.pages_total - 3
    for _ in range(4):
        flooder.put(*[abi.Broadcast(None, "flood", b"")] * 4000)
    flooder.sock.close()
    controller.host.send(control.Release(seat))
    stats = controller.stats()
    assert seat in stats.seats, "it is not released yet"
    assert stats.total.pages_free == stats.total.pages_total
    controller.from_host(control.Released, timeout=60)


def test_who_is_ended_in_the_middle_of_a_frame_subscribes_to_nothing_after_it(
    controller: ControllerProcess,
) -> None:
    _, older = controller.admit(user="a")
    older.put(abi.CreateQueue(None, Q), abi.AllocKvPage(1, Q, 1, 60))
    assert older.wait(1) is None
    newest, peer = controller.admit(user="a")
    alloc = abi.AllocKvPage(1, Q, 1, 10)
    peer.put(abi.CreateQueue(None, Q), alloc, abi.Subscribe(2, SUB, "news"))
    assert controller.from_host(control.End).seat == newest
    assert say(older, b"hello") == 0
