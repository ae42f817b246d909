"""Wrong input: a typed error for whoever sent it; everybody else goes on with correct output."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from inferlet import abi, errors

from piehost.wire import control
from piehost.wire.step import StepDone

from .controller_process import VOCAB, AnswerError, ControllerProcess, Peer
from .controller_programs import EMB, KV, OUT, TOK, Q, chain, setup
from .toy_device import greedy


@pytest.fixture(scope="module")
def shared() -> Iterator[ControllerProcess]:
    process = ControllerProcess(pages=128)
    yield process
    process.close()


@pytest.fixture
def controller(shared: ControllerProcess) -> Iterator[ControllerProcess]:
    """One controller for all; each test must leave its counters where they were."""
    yield shared
    for seat in shared.stats().seats:
        shared.release(seat)
    total = shared.stats().total
    assert (total.pages_free, total.rows_free, total.seats) == (128, 256, 0)


def assert_generates(controller: ControllerProcess, peer: Peer | None = None) -> None:
    """A correct program still gets the correct tokens."""
    if peer is None:
        _, peer = controller.admit()
    peer.put(*setup([4, 5, 6], 16), *chain(3, 6, 1000, []), abi.Synchronize(999, Q))
    controller.wait(peer, 999)
    assert [peer.wait(1000 + i) for i in range(6)] == greedy([4, 5, 6], 6, VOCAB)


# --- frames that end the inferlet ---------------------------------------------

good = msgspec.msgpack.encode([[1, None, b"x"]])


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


BAD_FRAMES = {
    "more bit": b"\x01\x01\xc0",
    "command frame": b"\x04\x05READY",
    "reserved bit": b"\x10\x01\xc0",
    "oversize": b"\x02" + (65537).to_bytes(8, "big"),
    "4 GiB": b"\x02" + (1 << 32).to_bytes(8, "big"),
    "2**63": b"\x02\x80" + b"\0" * 7,
    "no msgpack": b"\x00\x02\xc1\xc1",
    "empty body": b"\x00\x00",
    "not an array": b"\x00\x01\xc0",
    "a map": b"\x00\x01\x80",
    "trailing octets": bytes([0, len(good) + 1]) + good + b"\xc0",
    "truncated msgpack": bytes([0, len(good) - 1]) + good[:-1],
    "unknown op": b"\x00\x04\x91\x92\xcc\xfa"[:2] + b"\x91\x92\xcc\xfa",
    "op is a string": b"\x00\x05\x91\x92\xa1a\xc0",
    "depth 60000": b"\x02" + (60001).to_bytes(8, "big") + nested(60000),
    "array header of 2**32-1": b"\x00\x05\xdd\xff\xff\xff\xff",
    "too many commands": abi.frame_header(3 + 4097 * 3) + b"\xdc\x10\x01" + b"\x92\x02\x01" * 4097,
    "text that is no UTF-8": b"\x00\x06\x91\x94\x14\x01\x00\xa1"[:2]
    + b"\x91\x94\x14\x01\x00\xa1\xff",
}


def command(*fields: Any) -> bytes:
    body = msgspec.msgpack.encode([list(fields)])
    return abi.frame_header(len(body)) + body


BAD_FIELDS = {
    "handle 0": command(3, None, 0),
    "handle 2**32": command(3, None, 1 << 32),
    "negative request": command(3, -1, 1),
    "request is a float": command(3, 1.5, 1),
    "span of two": command(17, None, 1, [1, 0], []),
    "NaN temperature": command(19, None, 1, [1, 0], 1, float("nan")),
    "top_p 0": command(19, None, 1, [1, 0], 1, 1.0, 0, 0.0),
    "min_p 2": command(19, None, 1, [1, 0], 1, 1.0, 0, 1.0, 2.0),
    "65 stop tokens": command(19, None, 1, [1, 0], 1, 0.0, 0, 1.0, 0.0, None, [1] * 65),
    "one field too many": command(6, None, 1, 0, 7),
    "a field missing": command(6, None, 1),
    "priority 8": command(6, None, 1, 8),
    "position 2**31": command(16, None, 1, [1, 0], [1], 1 << 31),
    "message over 60,000": command(1, None, b"x" * 60001),
}


@pytest.mark.parametrize("name", [*BAD_FRAMES, *BAD_FIELDS])
def test_a_bad_frame_ends_its_sender_alone(controller: ControllerProcess, name: str) -> None:
    seat, bad = controller.admit()
    _, other = controller.admit()
    bad.put(*setup([1, 2, 3], 32))
    bad.sock.sendall({**BAD_FRAMES, **BAD_FIELDS}[name])
    end = controller.from_host(control.End)
    assert (end.seat, end.code) == (seat, "bad_frame")
    assert end.message and end.hint
    with pytest.raises((EOFError, ConnectionError)):
        bad.wait(1)
    assert_generates(controller, other)


def test_a_frame_cut_at_every_octet_is_waited_for(controller: ControllerProcess) -> None:
    _, slow = controller.admit()
    body = msgspec.msgpack.encode([[20, 7, 0, "w1 w2 " * 100, True]])
    for octet in abi.frame_header(len(body)) + body:
        slow.sock.sendall(bytes([octet]))
    assert slow.wait(7) == [1, 2] * 100


def test_an_inferlet_that_dies_within_a_frame_leaves_nothing(controller: ControllerProcess) -> None:
    seat, dying = controller.admit()
    dying.put(*setup([1, 2, 3], 64))
    dying.sock.sendall(b"\x02\0\0\0\0\0\0\xff\xffxx")
    dying.sock.close()
    controller.release(seat)
    assert_generates(controller)


# --- commands that fail -------------------------------------------------------

PREPARED = setup([1, 2, 3], 16)  # 2 pages, 3 slots written, emb 1 holds text, emb 2 an output


def fwd(**changes: Any) -> abi.Forward:
    fields: dict[str, Any] = {
        "req": 50,
        "queue": Q,
        "inputs": (EMB, 0, 1),
        "reads": [(KV, 0, 3)],
        "write": (KV, 3, 1),
        "outputs": (OUT, 0, 1),
    }
    return abi.Forward(**{**fields, **changes})


FAILURES: dict[str, tuple[type[errors.InferletError], abi.Command]] = {
    "forged kv": (errors.HandleError, fwd(reads=[(77, 0, 1)])),
    "forged emb": (errors.HandleError, fwd(inputs=(77, 0, 1))),
    "forged queue": (errors.HandleError, abi.Synchronize(50, 77)),
    "kv in use": (errors.HandleError, abi.AllocKvPage(50, Q, KV, 1)),
    "emb in use": (errors.HandleError, abi.AllocEmb(50, Q, EMB, 1)),
    "queue in use": (errors.HandleError, abi.CreateQueue(50, Q)),
    "no such model": (errors.ArgumentError, abi.CreateQueue(50, 9, 1)),
    "read beyond": (errors.SpanError, fwd(reads=[(KV, 0, 17)])),
    "read far beyond": (errors.SpanError, fwd(reads=[(KV, 2**32 - 1, 2**32 - 1)])),
    "write beyond": (errors.SpanError, fwd(write=(KV, 16, 1))),
    "write of another length": (errors.SpanError, fwd(write=(KV, 3, 2))),
    "write over reads": (errors.SpanError, fwd(write=(KV, 2, 1))),
    "inputs beyond": (errors.SpanError, fwd(inputs=(EMB, 2, 2), write=(KV, 3, 2))),
    "no inputs": (errors.SpanError, fwd(inputs=(EMB, 0, 0), write=(KV, 3, 0))),
    "outputs beyond": (errors.SpanError, fwd(outputs=(OUT, 1, 1))),
    "more outputs than inputs": (errors.SpanError, fwd(outputs=(EMB, 0, 2))),
    "position at the context": (errors.PositionError, fwd(positions=[512])),
    "two positions for one": (errors.PositionError, fwd(positions=[3, 4])),
    "embed beyond the context": (errors.PositionError, abi.EmbedTxt(50, Q, (EMB, 0), [1], 512)),
    "embed runs over the context": (
        errors.PositionError,
        abi.EmbedTxt(50, Q, (EMB, 0), [1, 2], 511),
    ),
    "positions and tokens differ": (
        errors.PositionError,
        abi.EmbedTxt(50, Q, (EMB, 0), [1, 2], [0]),
    ),
    "token beyond the vocabulary": (
        errors.ArgumentError,
        abi.EmbedTxt(50, Q, (EMB, 0), [VOCAB], 0),
    ),
    "token never sampled": (errors.UnwrittenError, abi.EmbedTxt(50, Q, (EMB, 0), [~9], 0)),
    "mask too short": (errors.MaskError, fwd(mask=b"")),
    "mask too long": (errors.MaskError, fwd(mask=b"\xff\xff")),
    "sample from text": (errors.UnwrittenError, abi.Sample(50, Q, (EMB, 0), TOK)),
    "sample beyond": (errors.SpanError, abi.Sample(50, Q, (OUT, 1), TOK)),
    "K is 0": (errors.ArgumentError, abi.GetNextDist(50, Q, (OUT, 0), 0, 0)),
    "ring range": (errors.ArgumentError, abi.GetNextDist(50, Q, (OUT, 0), 10, 65536 - 76)),
    "ring offset 2**32-1": (errors.ArgumentError, abi.GetNextDist(50, Q, (OUT, 0), 1, 2**32 - 4)),
    "ring alignment": (errors.ArgumentError, abi.GetNextDist(50, Q, (OUT, 0), 1, 2)),
    "free twice": (errors.HandleError, abi.DeallocKvPage(50, Q, 9)),
    "free beyond": (errors.SpanError, abi.DeallocKvPage(50, Q, KV, 1, 2)),
    "copy of other length": (errors.SpanError, abi.CopyKvPage(50, Q, (KV, 0, 1), (KV, 8, 2))),
    "copy onto itself": (errors.SpanError, abi.CopyKvPage(50, Q, (KV, 0, 2), (KV, 1, 2))),
    "mask beyond": (errors.SpanError, abi.MaskKvPage(50, Q, (KV, 10, 7), False)),
    "no pages": (errors.ArgumentError, abi.AllocKvPage(50, Q, 9, 0)),
    "no embeds": (errors.ArgumentError, abi.AllocEmb(50, Q, 9, 0)),
    "pages over the cap": (errors.QuotaError, abi.AllocKvPage(50, Q, 9, 63)),
    "shared pages over the cap": (errors.SpanError, abi.ShareKvPage(50, Q, 9, KV, 0, 3)),
    "embeds over the cap": (errors.QuotaError, abi.AllocEmb(50, Q, 9, 1021)),
    "a prompt longer than the context": (
        errors.PositionError,
        abi.EmbedTxt(50, Q, (EMB, 0), [1, 1, 1], 510),
    ),
    "tokenize for no model": (errors.ArgumentError, abi.Tokenize(50, 3, "w1")),
    "receive after the end": (errors.ClosedError, abi.Receive(50)),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_wrong_command_is_a_typed_error_and_the_queue_recovers(
    controller: ControllerProcess, name: str
) -> None:
    expected, wrong = FAILURES[name]
    seat, peer = controller.admit()
    if name == "receive after the end":
        controller.host.send(control.CloseInput(seat))
    peer.put(*PREPARED, wrong)
    with pytest.raises(AnswerError) as caught:
        controller.wait(peer, 50)
    assert caught.value.code == expected.code
    assert caught.value.message and caught.value.hint
    if hasattr(wrong, "queue") and not isinstance(wrong, abi.CreateQueue) and wrong.queue == Q:
        with pytest.raises(AnswerError) as again:
            controller.wait(peer, ask(peer, abi.Synchronize(51, Q)))
        assert again.value.code == expected.code
    peer.put(  # the same queue, pages and embeds still work
        abi.EmbedTxt(None, Q, (EMB, 0), [9], 3),
        fwd(req=None),
        abi.Sample(52, Q, (OUT, 0), TOK),
    )
    assert controller.wait(peer, 52) == greedy([1, 2, 3, 9], 1, VOCAB)[0]


def ask(peer: Peer, *commands: abi.Command) -> int:
    peer.put(*commands)
    request = commands[-1].req
    assert request is not None
    return request


def test_an_error_stops_its_queue_until_synchronize(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    peer.put(
        *PREPARED,
        abi.EmbedTxt(1, Q, (EMB, 0), [VOCAB], 0),
        fwd(req=2),
        abi.Sample(3, Q, (OUT, 0), TOK),
        abi.Synchronize(4, Q),
        abi.Synchronize(5, Q),
    )
    for request in (1, 2, 3, 4):
        with pytest.raises(AnswerError) as caught:
            controller.wait(peer, request)
        assert caught.value.code == errors.ArgumentError.code
    assert controller.wait(peer, 5) is None


def test_another_queue_of_the_same_inferlet_is_not_stopped(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    peer.put(abi.CreateQueue(None, 2), abi.AllocKvPage(None, 2, 9, 0))
    assert_generates(controller, peer)


def test_handles_of_others_are_like_handles_that_never_were(controller: ControllerProcess) -> None:
    _, owner = controller.admit()
    _, thief = controller.admit()
    owner.put(*PREPARED, abi.Synchronize(1, Q))
    controller.wait(owner, 1)
    messages = []
    thief.put(abi.CreateQueue(None, Q))
    for handle in (KV, 4242):
        with pytest.raises(AnswerError) as caught:
            controller.wait(thief, ask(thief, abi.DeallocKvPage(7, Q, handle)))
        thief.put(abi.Synchronize(8, Q))
        with pytest.raises(AnswerError):
            controller.wait(thief, 8)
        messages.append((caught.value.code, caught.value.message.replace(str(handle), "N")))
    assert messages[0] == messages[1]


def test_a_freed_page_cannot_be_used(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    peer.put(*PREPARED, abi.DeallocKvPage(1, Q, KV, 0, 1))
    controller.wait(peer, 1)
    with pytest.raises(AnswerError) as caught:
        controller.wait(peer, ask(peer, abi.EmbedTxt(None, Q, (EMB, 0), [1], 3), fwd()))
    assert caught.value.code == errors.SpanError.code


def test_a_write_into_a_shared_page_is_refused_until_it_is_let_go(
    controller: ControllerProcess,
) -> None:
    _, peer = controller.admit()
    peer.put(*PREPARED, abi.ShareKvPage(None, Q, 5, KV, 0, 1))
    peer.put(abi.EmbedTxt(None, Q, (EMB, 0), [9], 3))
    with pytest.raises(AnswerError) as caught:
        controller.wait(peer, ask(peer, fwd()))
    assert caught.value.code == errors.SharedPageError.code
    with pytest.raises(AnswerError):
        controller.wait(peer, ask(peer, abi.Synchronize(51, Q)))
    peer.put(
        abi.DeallocKvPage(None, Q, 5),
        abi.EmbedTxt(None, Q, (EMB, 0), [9], 3),
        fwd(req=None),
        abi.Sample(53, Q, (OUT, 0), TOK),
    )
    assert controller.wait(peer, 53) == greedy([1, 2, 3, 9], 1, VOCAB)[0]


# --- caps and exhaustion ------------------------------------------------------


def test_commands_beyond_the_cap_stop_the_queue(controller: ControllerProcess) -> None:
    _, peer = controller.admit(commands=50)
    peer.put(*setup([1, 2, 3], 64), *chain(3, 40, 100, []))
    with pytest.raises(AnswerError) as caught:
        controller.wait(peer, 139)
    assert caught.value.code == errors.QuotaError.code


def test_token_handles_have_a_cap(controller: ControllerProcess) -> None:
    _, peer = controller.admit(tokens=4)
    peer.put(*PREPARED, *[abi.Sample(60 + i, Q, (OUT, 0), 1 + i) for i in range(5)])
    assert controller.wait(peer, 63) == greedy([1, 2, 3], 1, VOCAB)[0]
    with pytest.raises(AnswerError) as caught:
        controller.wait(peer, 64)
    assert caught.value.code == errors.QuotaError.code


def test_more_pages_than_the_machine_has(controller: ControllerProcess) -> None:
    _, peer = controller.admit(kv_pages=1000)
    peer.put(abi.CreateQueue(None, Q))
    with pytest.raises(AnswerError) as caught:
        peer.ask(abi.AllocKvPage(1, Q, KV, 129))
    assert caught.value.code == errors.OutOfMemoryError.code


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


def test_the_controller_holds_no_descriptor_of_the_dead(controller: ControllerProcess) -> None:
    before = len(os.listdir(f"/proc/{controller.process.pid}/fd"))
    for _ in range(50):
        seat, peer = controller.admit()
        peer.put(*PREPARED)
        peer.sock.close()
        controller.release(seat)
    assert len(os.listdir(f"/proc/{controller.process.pid}/fd")) == before
