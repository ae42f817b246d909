"""Commands that cannot be carried out: a typed error for whoever sent them, and their queue stops
until `synchronize`."""

from __future__ import annotations

import pytest
from inferlet import abi, errors

from piehost.wire import control

from . import controller_unharmed
from .controller_process import VOCAB, AnswerError, ControllerProcess, Peer
from .controller_programs import EMB, KV, OUT, TOK, Q, chain, setup
from .controller_unharmed import PREPARED, assert_generates, fwd
from .toy_device import greedy

shared, controller = controller_unharmed.shared, controller_unharmed.controller  # the fixtures


# --- commands that fail -------------------------------------------------------


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


# --- caps ---------------------------------------------------------------------


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
