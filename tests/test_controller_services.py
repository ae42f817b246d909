"""What the host's services are asked, and what becomes of their replies. The test is the host."""

from __future__ import annotations

from typing import Any

import pytest
from inferlet import abi, errors

from piehost.wire import control, services
from piehost.wire.services import Call

from . import controller_fixtures
from .controller_answers import refused, settle
from .controller_process import AnswerError, ControllerProcess, Peer
from .controller_programs import KV, TOK, Q, setup

shared, controller = controller_fixtures.shared, controller_fixtures.emptied  # the fixtures


def next_ask(controller: ControllerProcess) -> control.Ask:
    ask: control.Ask = controller.from_host(control.Ask)
    return ask


def reply(controller: ControllerProcess, ask: control.Ask, value: Any = None) -> None:
    controller.host.send(control.Reply(ask.request, value))


def refuse(
    controller: ControllerProcess, ask: control.Ask, error: type[errors.InferletError]
) -> None:
    message = (error.code, "what and why", "what to try")
    controller.host.send(control.Reply(ask.request, error=message))


def failure(peer: Peer, request: int) -> type[errors.InferletError]:
    with pytest.raises(AnswerError) as caught:
        peer.wait(request)
    return errors.BY_CODE[caught.value.code]


# --- the calls ----------------------------------------------------------------

STORE: list[tuple[abi.Command, Call, Any]] = [
    (abi.StoreGet(1, "k"), services.StoreGet("k"), b"value"),
    (abi.StoreGet(1, "k"), services.StoreGet("k"), None),
    (abi.StoreSet(1, "k", b"v"), services.StoreSet("k", b"v"), None),
    (abi.StoreDelete(1, "k"), services.StoreDelete("k"), True),
    (abi.StoreExists(1, "k"), services.StoreExists("k"), False),
    (abi.StoreList(1, "p", "q"), services.StoreList("p", "q"), ["pa", "pb"]),
]


@pytest.mark.parametrize(("command", "call", "value"), STORE)
def test_a_call_reaches_the_host_and_its_reply_is_the_answer(
    controller: ControllerProcess, command: abi.Command, call: Call, value: Any
) -> None:
    seat, peer = controller.admit()
    peer.put(command)
    ask = next_ask(controller)
    assert (ask.seat, ask.call) == (seat, call)
    reply(controller, ask, value)
    assert peer.wait(1) == value


def test_an_error_of_the_host_is_the_answer_cut_where_it_is_long(
    controller: ControllerProcess,
) -> None:
    _, peer = controller.admit()
    peer.put(abi.StoreSet(1, "k", b"v"))
    ask = next_ask(controller)
    error = (errors.QuotaError.code, "x" * 100_000, "y" * 100_000)
    controller.host.send(control.Reply(ask.request, error=error))
    with pytest.raises(AnswerError) as caught:
        peer.wait(1)
    assert caught.value.code == errors.QuotaError.code
    assert len(caught.value.message) == len(caught.value.hint) == 1000


def test_calls_stay_in_order_and_replies_may_come_in_any(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    peer.put(abi.StoreSet(1, "k", b"v"), abi.StoreGet(2, "k"), abi.StoreSet(None, "k", b"w"))
    asks = [next_ask(controller) for _ in range(3)]
    kinds = [type(ask.call) for ask in asks]
    assert kinds == [services.StoreSet, services.StoreGet, services.StoreSet]
    for ask, value in ((asks[2], None), (asks[1], b"v"), (asks[0], None)):
        reply(controller, ask, value)
    assert peer.wait(2) == b"v"
    assert peer.wait(1) is None
    assert peer.order == [2, 1]


def test_an_exchange_over_http(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    url, headers = "http://example.org/", {"Accept": "text/plain"}
    peer.put(abi.HttpPost(1, 5, url, b"first", headers, True), abi.HttpWrite(2, 5, b"rest"))
    opening, writing = next_ask(controller), next_ask(controller)
    stream = opening.call.stream  # type: ignore[union-attr]
    assert opening.call == services.HttpOpen(stream, "POST", url, b"first", headers, True)
    assert writing.call == services.HttpWrite(stream, b"rest", False)
    reply(controller, writing)
    reply(controller, opening, [200, {"content-type": "text/plain"}])
    assert peer.wait(1) == [200, {"content-type": "text/plain"}]
    for part in (b"some", b""):
        peer.put(abi.HttpRead(3, 5))
        ask = next_ask(controller)
        assert ask.call == services.HttpRead(stream)
        reply(controller, ask, part)
        assert peer.wait(3) == part
    assert peer.ask(abi.HttpClose(4, 5)) is None
    assert next_ask(controller).call == services.HttpClose(stream)
    assert refused(peer, abi.HttpRead(5, 5)) is errors.HandleError
    peer.put(abi.HttpGet(6, 5, url))
    ask = next_ask(controller)
    assert isinstance(ask.call, services.HttpOpen)
    assert (ask.call.method, ask.call.more, ask.call.body) == ("GET", False, b"")
    assert ask.call.stream != stream


def test_a_get_that_fails_leaves_its_handle_free(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    peer.put(abi.HttpGet(1, 5, "http://a/"))
    refuse(controller, next_ask(controller), errors.DeniedError)
    assert failure(peer, 1) is errors.DeniedError
    assert refused(peer, abi.HttpRead(2, 5)) is errors.HandleError
    peer.put(abi.HttpGet(3, 5, "http://b/"))
    reply(controller, next_ask(controller), [200, {}])
    assert peer.wait(3) == [200, {}]


def test_closing_a_stream_answers_what_waits_on_it_and_drops_late_replies(
    controller: ControllerProcess,
) -> None:
    _, peer = controller.admit()
    peer.put(abi.HttpGet(1, 5, "http://a/"), abi.HttpRead(2, 5), abi.HttpClose(3, 5))
    opening, reading = next_ask(controller), next_ask(controller)
    assert failure(peer, 1) is failure(peer, 2) is errors.ClosedError
    assert peer.wait(3) is None
    peer.put(abi.HttpGet(4, 5, "http://b/"))
    assert isinstance(next_ask(controller).call, services.HttpClose)
    second = next_ask(controller)
    refuse(controller, opening, errors.UnavailableError)
    reply(controller, reading, b"of the first")
    reply(controller, second, [404, {}])
    assert peer.wait(4) == [404, {}], "and each request has one answer: `Peer` checks"
    peer.put(abi.HttpRead(5, 5))
    reply(controller, next_ask(controller), b"of the second")
    assert peer.wait(5) == b"of the second"


def test_one_read_waits_at_a_time(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    peer.put(abi.HttpGet(None, 5, "http://a/"), abi.HttpRead(1, 5))
    asks = [next_ask(controller), next_ask(controller)]
    assert refused(peer, abi.HttpRead(2, 5)) is errors.ArgumentError
    reply(controller, asks[1], b"x")
    assert peer.wait(1) == b"x"
    peer.put(abi.HttpRead(3, 5))
    refuse(controller, next_ask(controller), errors.UnavailableError)
    assert failure(peer, 3) is errors.UnavailableError
    peer.put(abi.HttpRead(4, 5))
    reply(controller, next_ask(controller), b"")
    assert peer.wait(4) == b""


def test_quota_tells_what_is_left_and_the_host_adds_to_it(controller: ControllerProcess) -> None:
    _, peer = controller.admit(user="q", tokens=10)
    peer.put(
        *setup([1, 2], 24),
        abi.Sample(1, Q, (2, 0), TOK),
        abi.AllocHistory(None, Q, 1, [5, 6, 7]),
        abi.ExportKvPage(2, Q, "mine", [(KV, 0, 2)]),
        abi.Subscribe(None, 1, "t"),
        abi.HttpGet(None, 1, "http://a/"),
    )
    controller.wait(peer, 2)
    next_ask(controller)
    peer.put(abi.Quota(3))
    ask = next_ask(controller)
    left = ask.call.left  # type: ignore[union-attr]
    assert left == {
        "kv_pages": 64 - 3,
        "embeds": 1024 - 3,
        "tokens": 9,
        "commands": 4096,
        "history": 4096 - 3,
        "export_pages": 32 - 2,
        "subscriptions": 15,
        "http_streams": 3,
    }
    reply(controller, ask, {**left, "store_bytes": 12.0})
    assert peer.wait(3) == {**left, "store_bytes": 12.0}


# --- wrong, and too much ------------------------------------------------------


def test_wrong_calls_are_typed_errors_and_do_not_reach_the_host(
    controller: ControllerProcess,
) -> None:
    _, peer = controller.admit(http_streams=1)
    _, other = controller.admit()
    other.put(abi.HttpGet(None, 9, "http://a/"))
    peer.put(abi.HttpGet(None, 1, "http://a/"))
    settle(controller)
    controller.inbox.clear()
    long, r = "\U0001f600" * 65, 50
    wrong: list[tuple[abi.Command, type[errors.InferletError]]] = [
        (abi.StoreGet(r, long), errors.ArgumentError),
        (abi.StoreSet(r, long, b""), errors.ArgumentError),
        (abi.StoreDelete(r, long), errors.ArgumentError),
        (abi.StoreExists(r, long), errors.ArgumentError),
        (abi.StoreList(r, long), errors.ArgumentError),
        (abi.StoreList(r, "", long), errors.ArgumentError),
        (abi.HttpGet(r, 2, "http://a/" + "\U0001f600" * 2100), errors.ArgumentError),
        (abi.HttpGet(r, 1, "http://a/"), errors.HandleError),
        (abi.HttpPost(r, 1, "http://a/"), errors.HandleError),
        (abi.HttpGet(r, 2, "http://a/"), errors.QuotaError),
        (abi.HttpRead(r, 9), errors.HandleError),
        (abi.HttpWrite(r, 9, b""), errors.HandleError),
        (abi.HttpClose(r, 9), errors.HandleError),
        (abi.HttpRead(r, 77), errors.HandleError),
    ]
    for command, error in wrong:
        assert refused(peer, command) is error, command
    peer.put(abi.HttpRead(None, 1))
    settle(controller)
    assert not [m for m in controller.inbox if isinstance(m, control.Ask)]


def test_calls_that_wait_for_the_host_have_a_cap_each_inferlet_its_own(
    controller: ControllerProcess,
) -> None:
    _, peer = controller.admit()
    _, other = controller.admit()
    peer.put(*[abi.StoreGet(1000 + i, "k") for i in range(70)])
    for i in range(64, 70):
        assert failure(peer, 1000 + i) is errors.QuotaError
    other.put(abi.StoreGet(1, "k"))
    asks = [next_ask(controller) for _ in range(65)]
    assert asks[-1].seat != asks[0].seat
    reply(controller, asks[5], b"one is done")
    assert peer.wait(1005) == b"one is done"
    peer.put(abi.StoreGet(2000, "k"))
    reply(controller, next_ask(controller), b"room for another")
    assert peer.wait(2000) == b"room for another"


def test_the_octets_of_waiting_calls_have_a_cap(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    for i in range(17):
        peer.put(abi.StoreSet(100 + i, "k", bytes(60000)))
    asks = [next_ask(controller) for _ in range(17)]
    assert refused(peer, abi.StoreSet(1, "k", bytes(60000))) is errors.QuotaError
    for ask in asks:
        reply(controller, ask)
    assert [peer.wait(100 + i) for i in range(17)] == [None] * 17
    peer.put(abi.StoreSet(2, "k", bytes(60000)))
    reply(controller, next_ask(controller))
    assert peer.wait(2) is None


def test_replies_for_the_dead_and_unasked_ones_are_dropped(controller: ControllerProcess) -> None:
    seat, peer = controller.admit()
    peer.put(abi.StoreGet(1, "k"), abi.HttpGet(2, 1, "http://a/"))
    asks = [next_ask(controller), next_ask(controller)]
    controller.release(seat)
    _, other = controller.admit()
    other.put(abi.StoreGet(1, "k"))
    third = next_ask(controller)
    for ask in asks:
        reply(controller, ask, b"too late")
    controller.host.send(control.Reply(10**9, b"unasked"))
    reply(controller, third, b"right")
    reply(controller, third, b"twice")
    assert other.wait(1) == b"right"
    settle(controller)


def test_an_answer_too_large_for_a_frame_is_an_error(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    peer.put(abi.HttpGet(1, 1, "http://a/"))
    reply(controller, next_ask(controller), [200, {"x": "y" * 70000}])
    assert failure(peer, 1) is errors.UnavailableError
    peer.put(abi.StoreGet(2, "k"))
    reply(controller, next_ask(controller), bytes(60000))
    assert peer.wait(2) == bytes(60000)


def test_a_program_that_reads_may_have_every_call_answered_at_once(
    controller: ControllerProcess,
) -> None:
    """As large as they may be, they are more than its socket takes."""
    seat, peer = controller.admit()
    peer.put(*[abi.StoreGet(i, "k") for i in range(64)])
    for ask in [next_ask(controller) for _ in range(64)]:
        reply(controller, ask, bytes(60000))
    settle(controller)
    assert all(peer.wait(i) == bytes(60000) for i in range(64))
    assert seat in controller.stats().seats


def test_streams_opened_and_closed_again_wait_for_the_host_like_others(
    controller: ControllerProcess,
) -> None:
    """Else what is opened and closed faster than the host can would pile up in it."""
    _, peer = controller.admit()
    for i in range(100):
        peer.put(abi.HttpGet(1000 + i, 1, "http://x/"), abi.HttpClose(2000 + i, 1))
    settle(controller)
    asks = [ask for ask in controller.inbox if isinstance(ask, control.Ask)]
    opened = [ask for ask in asks if isinstance(ask.call, services.HttpOpen)]
    assert len(opened) == 64
    assert failure(peer, 1000) is errors.ClosedError and peer.wait(2000) is None
    assert failure(peer, 1099) is errors.QuotaError
    for ask in opened:
        refuse(controller, ask, errors.ClosedError)
    settle(controller)
    controller.inbox.clear()
    peer.put(abi.HttpGet(1, 1, "http://x/"))
    reply(controller, next_ask(controller), [200, {}])
    assert peer.wait(1) == [200, {}]
