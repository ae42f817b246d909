"""Penalties over histories: which tokens count, known or not yet, and how many a history holds."""

from __future__ import annotations

from typing import Any

import pytest
from inferlet import abi, errors

from . import controller_fixtures
from .controller_answers import outcome
from .controller_process import VOCAB, ControllerProcess
from .controller_programs import EMB, KV, TOK, Q
from .controller_samples import FIRST, HIST, VECTOR, admit, answers, goes_on, sample
from .toy_device import Control, choose, ints

controller = controller_fixtures.audited  # the fixture


# --- penalties ------------------------------------------------------------------------------------


def penalized(prompt: list[int], added: list[int], penalties: dict[str, float]) -> int:
    control = Control(
        repetition=penalties.get("repetition_penalty", 1.0),
        presence=penalties.get("presence_penalty", 0.0),
        frequency=penalties.get("frequency_penalty", 0.0),
        prompt=prompt,
        added=added,
    )
    token = choose(VECTOR, VOCAB, control)
    assert token is not None
    return token


@pytest.mark.parametrize(
    ("penalties", "prompt", "added"),
    [
        ({"repetition_penalty": 1.5}, True, True),
        ({"presence_penalty": 2.5}, False, True),
        ({"frequency_penalty": 1.5}, False, True),
    ],
)
def test_a_prompt_counts_for_repetition_alone(
    controller: ControllerProcess, penalties: dict[str, Any], prompt: bool, added: bool
) -> None:
    peer = admit(controller)
    peer.put(
        abi.AllocHistory(None, Q, 1, [FIRST, 5, FIRST]),
        abi.AllocHistory(None, Q, 2, [5]),
        abi.ExtendHistory(None, Q, 2, [FIRST]),
        abi.ExtendHistory(None, Q, 2, [FIRST]),
        sample(1, history=1, **penalties),
        sample(2, history=2, **penalties),
        sample(3, **penalties),
    )
    one, two, plain = answers(controller, peer, 1, 2, 3)
    assert (one != FIRST, two != FIRST) == (prompt, added)
    assert one == penalized([FIRST, 5, FIRST], [], penalties)
    assert two == penalized([5], [FIRST, FIRST], penalties)
    assert plain == FIRST, "without a history they change nothing"


def test_a_chain_with_penalties_is_pipelined(controller: ControllerProcess) -> None:
    """Each token joins the history before its value is known to the controller."""
    peer = admit(controller)
    penalties: dict[str, Any] = {"frequency_penalty": -1000.0}  # whatever has come most comes again
    chain: list[abi.Command] = [abi.AllocHistory(None, Q, HIST, [9, 9])]
    for i in range(10):
        chain += [sample(i, history=HIST, stop=[VOCAB - 1], **penalties), *goes_on(3 + i, ~TOK)]
    peer.put(*chain)
    assert len(controller.collect()) == 2
    assert answers(controller, peer, *range(10)) == [FIRST] * 10
    history = [ints(step.history) for step in controller.device.steps if step.history]
    assert [len(tokens) for tokens in history] == list(range(2, 12))
    assert any(tokens[-1] < 0 for tokens in history), "sent while the last token was unknown"


def test_samples_of_one_history_in_one_place_see_each_other(controller: ControllerProcess) -> None:
    """They cannot share a step: the second one needs the first one's token."""
    peer = admit(controller)
    peer.put(abi.AllocHistory(None, Q, HIST))
    peer.put(*[sample(i, history=HIST, presence_penalty=900.0) for i in range(1, 6)])
    expected = [(FIRST + i) % VOCAB for i in range(5)]
    assert answers(controller, peer, 1, 2, 3, 4, 5) == expected


def test_without_penalties_a_history_holds_nothing_up(controller: ControllerProcess) -> None:
    peer = admit(controller)
    before = len(controller.device.steps)
    peer.put(abi.AllocHistory(None, Q, HIST), *[sample(i, history=HIST) for i in range(1, 6)])
    controller.wait(peer, 5)
    assert len(controller.device.steps) == before + 1
    peer.put(sample(6, history=HIST, frequency_penalty=0.5))
    assert controller.wait(peer, 6) == (FIRST + 1) % VOCAB, "five times: 2.5 lower"
    peer.put(sample(7, history=HIST, frequency_penalty=0.1))
    assert controller.wait(peer, 7) == FIRST, "five times: 0.5 lower"


@pytest.mark.parametrize("wait", [False, True])
def test_a_stopped_token_joins_no_history(controller: ControllerProcess, wait: bool) -> None:
    """Also where the next sample does not descend from it, and so is not dropped with it."""
    peer = admit(controller)
    burst: list[abi.Command] = [
        abi.AllocHistory(None, Q, HIST),
        sample(1, history=HIST, stop=[FIRST]),
        abi.ExtendHistory(None, Q, HIST, [~TOK, 7]),
        sample(2, token=2, history=HIST, presence_penalty=1.5),
        abi.AllocHistory(None, Q, 2, [~TOK]),
        sample(3, token=3, history=2, repetition_penalty=2.0),
    ]
    got = []
    for command in burst:
        peer.put(command)
        if wait and command.req is not None:
            got.append(controller.wait(peer, command.req))
    got = got or answers(controller, peer, 1, 2, 3)
    assert got == [FIRST] * 3


def test_late_tokens_of_a_prompt_count_as_prompt(controller: ControllerProcess) -> None:
    peer = admit(controller)
    peer.put(
        sample(1),
        abi.AllocHistory(None, Q, HIST, [5, ~TOK]),
        abi.ExtendHistory(None, Q, HIST, [6]),
        *goes_on(3, ~TOK),
        sample(2, history=HIST, presence_penalty=-900.0, repetition_penalty=1.25),
    )
    assert controller.wait(peer, 2) == 6
    step = controller.device.steps[-1]
    assert ints(step.history)[1] < 0, "sent while it was unknown"
    assert step.penalties[0][4:] == (2, 3)


def test_a_history_that_is_freed_and_made_again_is_empty(controller: ControllerProcess) -> None:
    peer = admit(controller)
    peer.put(
        abi.AllocHistory(None, Q, HIST, [FIRST]),
        sample(1, history=HIST, repetition_penalty=2.0),
        abi.DeallocHistory(2, Q, HIST),
        abi.AllocHistory(3, Q, HIST),
        sample(4, history=HIST, repetition_penalty=2.0),
        abi.AllocHistory(5, Q, HIST),
    )
    assert outcome(controller, peer, 5) is errors.HandleError
    assert [peer.wait(i) for i in (1, 2, 3, 4)] == [(FIRST + 1) % VOCAB, None, None, FIRST]


# --- caps -----------------------------------------------------------------------------------------


def test_histories_hold_no_more_tokens_than_their_cap(controller: ControllerProcess) -> None:
    peer = admit(controller, history=10)
    grow = [
        abi.AllocHistory(1, Q, 2, [1] * 3),
        abi.ExtendHistory(1, Q, HIST, [1] * 3),
    ]
    peer.put(abi.AllocHistory(None, Q, HIST, [1] * 8))
    for command in grow:
        peer.put(command, abi.Synchronize(None, Q))
        assert outcome(controller, peer, 1) is errors.QuotaError
    peer.put(sample(1, history=HIST), sample(2, history=HIST), sample(3, history=HIST))
    got = [outcome(controller, peer, i) for i in (1, 2, 3)]
    assert got == [FIRST, FIRST, errors.QuotaError]
    peer.put(abi.DeallocHistory(4, Q, HIST), abi.Synchronize(None, Q))
    peer.put(abi.AllocHistory(5, Q, HIST, [1] * 10))
    assert [outcome(controller, peer, i) for i in (4, 5)] == [None, None]


def test_tokens_that_are_dropped_do_not_count_against_the_cap(
    controller: ControllerProcess,
) -> None:
    """All of it is queued before anything is known, and at the cap if all were to be kept."""
    peer = admit(controller, history=2)
    peer.put(
        abi.AllocHistory(None, Q, HIST),
        sample(1, history=HIST, stop=[FIRST]),
        sample(2, token=2, history=HIST, stop=[FIRST]),
        abi.EmbedTxt(None, Q, (EMB, 0), [~TOK], 3),
        abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, 3)], (KV, 3, 1), (EMB, 0, 1)),
        abi.Sample(3, Q, (EMB, 0), TOK, history=HIST),
        sample(4, history=HIST),
        abi.ExtendHistory(5, Q, HIST, [~2, 7]),
        sample(6, history=HIST),
    )
    got = [outcome(controller, peer, i) for i in range(1, 7)]
    assert got == [FIRST, FIRST, None, FIRST, None, errors.QuotaError]


def test_histories_without_tokens_have_a_cap(controller: ControllerProcess) -> None:
    peer = admit(controller)
    peer.put(*[abi.AllocHistory(i, Q, i) for i in range(1, 258)])
    assert outcome(controller, peer, 256) is None
    assert outcome(controller, peer, 257) is errors.QuotaError
    peer.ask(abi.DestroyQueue(2000, Q))
    peer.put(abi.CreateQueue(None, Q), *[abi.AllocHistory(None, Q, i) for i in range(1, 257)])
    peer.put(abi.Synchronize(2001, Q))
    assert outcome(controller, peer, 2001) is None


def test_what_samples_bring_along_is_bounded_in_a_step(controller: ControllerProcess) -> None:
    """For one inferlet, and for all."""
    cap = 65536
    peers = [admit(controller, 32, history=cap) for _ in range(12)]
    fields: dict[str, Any] = {"history": HIST, "frequency_penalty": 0.25}
    for peer in peers:
        peer.put(*[abi.AllocHistory(None, Q, 1, [7] * 30000)])
        peer.put(*[abi.ExtendHistory(None, Q, 1, [7] * 30000)])
        biased = sample(None, bias=[(i, 0.0) for i in range(1000)], **fields)
        peer.put(biased, *[sample(None, bias=biased.bias)] * 3)
    controller.collect()
    for peer in peers:
        peer.put(*[sample(None, bias=[(i, 0.0) for i in range(1000)])] * 3)
        peer.put(abi.Synchronize(1, Q))
    for peer in peers:
        controller.wait(peer, 1)
    steps = controller.device.steps
    histories = [len(ints(s.history)) for s in steps]
    biases = [len(ints(s.bias_tokens)) for s in steps]
    assert sum(histories) == 12 * 60000 and sum(biases) == 12 * 7 * 1000
    assert max(a + 3 * b for a, b in zip(histories, biases, strict=True)) <= 1 << 19


def test_one_inferlets_histories_leave_room_for_others(controller: ControllerProcess) -> None:
    peer = admit(controller, history=1 << 20)
    for q in range(2, 22):
        peer.put(abi.AllocHistory(None, Q, q, [7] * 20000))
        peer.put(abi.CreateQueue(None, q), abi.AllocEmb(None, q, 100 + q, 1))
        peer.put(abi.EmbedTxt(None, q, (100 + q, 0), [1]))
        peer.put(abi.Forward(None, q, (100 + q, 0, 1), [], None, (100 + q, 0, 1)))
    for q in range(2, 22):
        peer.put(abi.Synchronize(q, q))
    for q in range(2, 22):
        controller.wait(peer, q)
    peer.put(sample(1))
    controller.collect()
    for q in range(2, 22):
        peer.put(abi.Sample(q, q, (100 + q, 0), q, history=q, frequency_penalty=0.5))
    controller.collect()
    for q in range(2, 22):
        controller.wait(peer, q)
    histories = [len(ints(step.history)) for step in controller.device.steps]
    assert sum(histories) == 20 * 20000 and max(histories) <= 1024 * 256
