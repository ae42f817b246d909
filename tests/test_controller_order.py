"""As if one command after the other: what pipelining, chunks and freed handles must not change."""

from __future__ import annotations

import pytest
from inferlet import abi, errors

from piehost.wire.step import StepDone

from . import controller_fixtures
from .controller_answers import outcome
from .controller_process import VOCAB, AnswerError, ControllerProcess, Peer
from .controller_programs import EMB, KV, OUT, TOK, Q, chain, setup
from .toy_device import greedy, ints, next_token

controller = controller_fixtures.audited  # the fixture

PAGES = 64


def attended(controller: ControllerProcess, peer: Peer, request: int) -> list[tuple[int, int]]:
    """What the forward whose output `request` samples from attended to: (position, token)."""
    controller.wait(peer, request)
    row = ints(controller.device.steps[-1].sample_rows)[-1]
    return sorted(controller.device.rows[row])


# --- undoing after a stop -----------------------------------------------------


@pytest.mark.parametrize("hit", [0, 1, 2, 4])
def test_what_is_queued_behind_a_stopped_chain_never_sees_its_writes(
    controller: ControllerProcess, hit: int
) -> None:
    """A plain forward, queued in the same frame as the chain, reads the slots of dropped steps."""
    prompt = [21, 22, 23]
    reference = greedy(prompt, 6, VOCAB)
    _, peer = controller.admit()
    peer.put(
        *setup(prompt, 16),
        *chain(3, 6, 100, [reference[hit]]),
        abi.EmbedTxt(None, Q, (EMB, 0), [777], 8),
        abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, 8)], (KV, 8, 1), (OUT, 0, 1)),
        abi.Sample(1, Q, (OUT, 0), TOK),
    )
    kept = [*prompt, *reference[:hit]]
    assert attended(controller, peer, 1) == [*enumerate(kept), (8, 777)]


def test_a_sample_from_the_text_of_a_stopped_token_is_dropped(
    controller: ControllerProcess,
) -> None:
    first = greedy([1, 2], 1, VOCAB)[0]
    _, peer = controller.admit()
    peer.put(*setup([1, 2], 8), abi.Sample(1, Q, (OUT, 0), TOK, stop=[first]))
    assert controller.wait(peer, 1) == first
    peer.put(abi.EmbedTxt(None, Q, (EMB, 0), [~TOK], 2), abi.Sample(2, Q, (EMB, 0), 9))
    assert outcome(controller, peer, 2) is None


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (abi.Forward(2, Q, (EMB, 0, 1), [(77, 0, 1)]), errors.HandleError),
        (abi.Forward(2, Q, (EMB, 0, 2), []), errors.UnwrittenError),
        (abi.Forward(2, Q, (EMB, 0, 1), [], None, None, [512]), errors.PositionError),
        (abi.Sample(2, Q, (EMB, 0), 9), None),
        (abi.Forward(2, Q, (EMB, 0, 1), []), None),
    ],
)
def test_what_is_dropped_is_checked_all_the_same(
    controller: ControllerProcess, wait: bool, wrong: abi.Command, expected: object
) -> None:
    """The answer does not depend on whether the stop is known when the command's turn comes."""
    first = greedy([1, 2], 1, VOCAB)[0]
    _, peer = controller.admit()
    peer.put(
        *setup([1, 2], 8),
        abi.DeallocEmb(None, Q, EMB),
        abi.AllocEmb(None, Q, EMB, 2),
        abi.Sample(1, Q, (OUT, 0), TOK, stop=[first]),
    )
    if wait:
        controller.wait(peer, 1)
    peer.put(abi.EmbedTxt(None, Q, (EMB, 0), [~TOK], 2), wrong)
    assert outcome(controller, peer, 2) is expected


# --- a forward that is under way, or waits ------------------------------------


@pytest.mark.parametrize("how", ["dealloc", "partial dealloc", "destroy"])
def test_pages_freed_under_a_prefill_are_not_written_any_more(
    controller: ControllerProcess, how: str
) -> None:
    """Another queue frees them between two chunks and a neighbour gets them."""
    _, peer = controller.admit()
    _, neighbour = controller.admit()
    peer.put(
        abi.CreateQueue(None, 2),
        abi.AllocKvPage(3, 2, 9, 40),
        abi.CreateQueue(None, Q),
        abi.AllocEmb(None, Q, EMB, 200),
        abi.EmbedTxt(None, Q, (EMB, 0), [5] * 200, 0),
        abi.Forward(1, Q, (EMB, 0, 200), [], (9, 0, 200)),
    )
    controller.collect()
    free = {
        "dealloc": abi.DeallocKvPage(2, 2, 9),
        "partial dealloc": abi.DeallocKvPage(2, 2, 9, 0, 40),
        "destroy": abi.DestroyQueue(2, 2),
    }[how]
    peer.put(free)
    peer.wait(2)
    neighbour.put(*setup([7, 8], 40 * 8), abi.Synchronize(1, Q))
    controller.wait(neighbour, 1)
    failure = outcome(controller, peer, 1)
    assert failure is (errors.SpanError if how == "partial dealloc" else errors.HandleError)
    neighbour.put(
        abi.EmbedTxt(None, Q, (EMB, 0), [9], 400),
        abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, 320)], None, (OUT, 0, 1)),
        abi.Sample(2, Q, (OUT, 0), TOK),
    )
    assert attended(controller, neighbour, 2) == [(0, 7), (1, 8), (400, 9)]


def test_embeds_freed_under_a_prefill_take_no_rows(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    peer.put(
        *setup([5] * 200, 200)[:-1],
        abi.CreateQueue(None, 2),
        abi.AllocEmb(None, 2, 9, 100),
        abi.Synchronize(3, 2),
        abi.Forward(1, Q, (EMB, 0, 200), [], (KV, 0, 200), (9, 0, 100)),
    )
    controller.collect()
    peer.ask(abi.DeallocEmb(2, 2, 9))
    assert outcome(controller, peer, 1) is errors.HandleError


def test_a_prefill_that_failed_half_way_does_not_come_back(controller: ControllerProcess) -> None:
    """Its rest must not run in place of the next forward."""
    _, peer = controller.admit()
    peer.put(
        *setup([5] * 100, 128)[:-1],
        abi.Forward(1, Q, (EMB, 0, 100), [], (KV, 0, 100)),
    )
    for _ in range(2):  # the second step was on its way already
        step = controller.collect().pop(0)
        controller.backend.send(StepDone(step.step, error="broken"))
    assert outcome(controller, peer, 1) is errors.BackendError
    peer.put(
        abi.Synchronize(2, Q),
        abi.AllocKvPage(None, Q, 5, 1),
        abi.EmbedTxt(None, Q, (EMB, 0), [1, 2, 3], 0),
        abi.Forward(3, Q, (EMB, 0, 3), [], (5, 0, 3), (OUT, 0, 1)),
        abi.Sample(4, Q, (OUT, 0), TOK),
    )
    assert outcome(controller, peer, 2) is errors.BackendError
    assert controller.wait(peer, 4) == greedy([1, 2, 3], 1, VOCAB)[0]


def test_a_share_freed_after_a_read_lets_no_write_overtake_it(
    controller: ControllerProcess,
) -> None:
    """The forward reads, through a share, a slot that the next one writes through the source."""
    _, peer = controller.admit()
    peer.put(
        *setup([1, 2, 3], 8),
        abi.ShareKvPage(None, Q, 5, KV, 0, 1),
        abi.Synchronize(1, Q),
    )
    controller.wait(peer, 1)
    peer.put(
        abi.EmbedTxt(None, Q, (EMB, 0), [8, 9], 6),
        abi.Forward(None, Q, (EMB, 1, 1), [(5, 0, 8)], None, (OUT, 0, 1)),
        abi.DeallocKvPage(None, Q, 5),
        abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, 3)], (KV, 6, 1)),
        abi.Sample(2, Q, (OUT, 0), TOK),
    )
    seen = [*enumerate([1, 2, 3]), (7, 9)]
    assert controller.wait(peer, 2) == next_token(tuple(seen), VOCAB)


def test_a_copy_after_a_read_lets_no_write_overtake_it(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    peer.put(*setup([1, 2, 3], 16), abi.Synchronize(1, Q))
    controller.wait(peer, 1)
    peer.put(
        abi.AllocKvPage(None, Q, 5, 1),
        abi.EmbedTxt(None, Q, (EMB, 0), [8, 9], 6),
        abi.Forward(None, Q, (EMB, 1, 1), [(KV, 0, 8)], None, (OUT, 0, 1)),
        abi.CopyKvPage(None, Q, (KV, 8, 1), (5, 0, 1)),
        abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, 3)], (KV, 6, 1)),
        abi.Sample(2, Q, (OUT, 0), TOK),
    )
    seen = [*enumerate([1, 2, 3]), (7, 9)]
    assert controller.wait(peer, 2) == next_token(tuple(seen), VOCAB)


def test_a_page_freed_after_a_read_is_nobodys_before_that_step_has_left(
    controller: ControllerProcess,
) -> None:
    """All in one step, in which copies come before forwards: had the new handle the old page, the
    forward would read the copy."""
    _, peer = controller.admit()
    peer.put(
        *setup([1, 2, 3], 8),
        abi.AllocKvPage(None, Q, 5, 1),
        abi.EmbedTxt(None, Q, (EMB, 0), [8, 9], 0),
        abi.Forward(None, Q, (EMB, 0, 2), [], (5, 0, 2)),
        abi.Synchronize(1, Q),
    )
    controller.wait(peer, 1)
    steps = len(controller.device.steps)
    peer.put(
        abi.EmbedTxt(None, Q, (EMB, 0), [7], 3),
        abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, 3)], None, (OUT, 0, 1)),
        abi.DeallocKvPage(None, Q, KV),
        abi.AllocKvPage(None, Q, 6, 1),
        abi.CopyKvPage(None, Q, (5, 0, 2), (6, 0, 2)),
        abi.Sample(2, Q, (OUT, 0), TOK),
    )
    assert controller.wait(peer, 2) == next_token(tuple(enumerate([1, 2, 3, 7])), VOCAB)
    assert len(controller.device.steps) == steps + 1


def test_inputs_whose_positions_go_back_attend_to_each_other(
    controller: ControllerProcess,
) -> None:
    """More of them than a step's prefill takes: they cannot be run in pieces."""
    _, peer = controller.admit()
    positions = list(range(59, -1, -1))
    peer.put(*setup([5] * 60, 64)[:-1])
    peer.put(
        abi.Forward(None, Q, (EMB, 0, 60), [], (KV, 0, 60), (OUT, 0, 1)),
        abi.Forward(None, Q, (EMB, 0, 60), [], (KV, 0, 60), (EMB, 0, 60), positions),
        abi.Sample(1, Q, (EMB, 0), TOK),
    )
    assert controller.wait(peer, 1) == next_token(tuple((p, 5) for p in range(60)), VOCAB)


def test_showing_slots_of_a_shared_page_is_a_write(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    peer.put(*setup([1], 8), abi.ShareKvPage(None, Q, 5, KV, 0, 1))
    peer.put(abi.MaskKvPage(1, Q, (KV, 0, 1), True))
    assert outcome(controller, peer, 1) is errors.SharedPageError


# --- errors and answers in order ----------------------------------------------


def test_synchronize_reports_no_error_of_a_later_command(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    peer.put(
        *setup([1, 2], 8),
        abi.Sample(1, Q, (OUT, 0), TOK),
        abi.Synchronize(2, Q),
        abi.EmbedTxt(3, Q, (EMB, 0), [VOCAB], 0),
        abi.Synchronize(4, Q),
    )
    assert [outcome(controller, peer, i) for i in (2, 3, 4)] == [
        None,
        errors.ArgumentError,
        errors.ArgumentError,
    ]


def test_synchronize_does_not_wait_for_steps_of_others(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    _, other = controller.admit()
    peer.put(*setup([1, 2], 8), abi.Sample(1, Q, (OUT, 0), TOK), abi.Synchronize(2, Q))
    other.put(*setup([3, 4], 16), *chain(2, 6, 100, []))
    controller.collect()
    controller.serve()
    assert peer.wait(2) is None
    assert controller.collect(), "the other one's step is unanswered"


def test_what_ran_behind_a_failed_step_fails_with_it(controller: ControllerProcess) -> None:
    """Step 2 takes its input from a sample of step 1, which came to nothing."""
    _, peer = controller.admit()
    peer.put(*setup([1, 2], 16), *chain(2, 4, 100, []))
    first, second = controller.collect()
    controller.waiting.clear()
    controller.device.run(first)
    controller.backend.send(StepDone(first.step, error="broken"))
    controller.backend.send(controller.device.run(second))
    assert [outcome(controller, peer, 100 + i) for i in range(4)] == [errors.BackendError] * 4
    peer.put(abi.Synchronize(1, Q), abi.Synchronize(2, Q))
    assert outcome(controller, peer, 1) is errors.BackendError
    assert controller.wait(peer, 2) is None


def test_after_a_failed_step_its_outputs_and_tokens_are_unwritten(
    controller: ControllerProcess,
) -> None:
    """A row of the device's holds what somebody else left there."""
    _, peer = controller.admit()
    peer.put(*setup([1, 2], 8), abi.Sample(1, Q, (OUT, 0), TOK))
    step = controller.collect().pop(0)
    controller.backend.send(StepDone(step.step, error="broken"))
    for request, wrong in ((2, abi.Sample(2, Q, (OUT, 0), 9)), (3, fill(~TOK))):
        peer.put(abi.Synchronize(None, Q), wrong)
        assert outcome(controller, peer, request) is errors.UnwrittenError


def fill(token: int) -> abi.EmbedTxt:
    return abi.EmbedTxt(3, Q, (EMB, 0), [token], 3)


def test_after_a_failed_copy_its_target_is_unwritten(controller: ControllerProcess) -> None:
    """Through every handle, a share made before the failure was known too."""
    _, peer = controller.admit()
    peer.put(*setup([1, 2, 3], 16), abi.AllocKvPage(None, Q, 5, 2), abi.Synchronize(1, Q))
    controller.wait(peer, 1)
    peer.put(
        abi.CopyKvPage(2, Q, (KV, 0, 3), (5, 0, 3)),
        abi.ShareKvPage(None, Q, 6, 5, 0, 1),
    )
    step = controller.collect().pop(0)
    controller.backend.send(StepDone(step.step, error="broken"))
    assert outcome(controller, peer, 2) is errors.BackendError
    peer.put(
        abi.Synchronize(None, Q),
        abi.EmbedTxt(None, Q, (EMB, 0), [9], 3),
        abi.AllocKvPage(None, Q, 7, 1),
        abi.Forward(None, Q, (EMB, 0, 1), [(6, 0, 3)], None, (OUT, 0, 1)),
        abi.Sample(3, Q, (OUT, 0), TOK),
        abi.DeallocKvPage(None, Q, 6),
        abi.Forward(None, Q, (EMB, 0, 1), [(5, 0, 3)], (5, 3, 1), (OUT, 0, 1)),
        abi.Sample(4, Q, (OUT, 0), TOK),
    )
    for request in (3, 4):
        assert controller.wait(peer, request) == next_token(((3, 9),), VOCAB)


def test_after_the_backend_is_lost_every_answer_still_comes(controller: ControllerProcess) -> None:
    """Also behind a `synchronize`, which makes the queue usable again."""
    _, peer = controller.admit()
    peer.put(abi.CreateQueue(None, Q), abi.AllocKvPage(1, Q, KV, 1))
    peer.wait(1)
    controller.backend.close()
    peer.put(
        abi.AllocEmb(None, Q, EMB, 1),
        abi.AllocEmb(None, Q, OUT, 1),
        abi.Synchronize(2, Q),
        abi.EmbedTxt(3, Q, (EMB, 0), [1], 0),
        abi.Forward(4, Q, (EMB, 0, 1), [], (KV, 0, 1), (OUT, 0, 1)),
        abi.Synchronize(5, Q),
        abi.Forward(6, Q, (EMB, 0, 1), [], (KV, 0, 1), (OUT, 0, 1)),
        abi.Sample(7, Q, (OUT, 0), TOK),
    )
    for request in (4, 5, 6, 7):
        with pytest.raises(AnswerError) as caught:
            peer.wait(request)
        assert caught.value.code == errors.BackendError.code


def test_a_forward_cancelled_half_way_leaves_what_ran_and_nothing_else(
    controller: ControllerProcess,
) -> None:
    prompt = list(range(1, 101))
    _, peer = controller.admit()
    peer.put(
        abi.CreateQueue(None, Q),
        abi.AllocKvPage(None, Q, KV, 13),
        abi.AllocEmb(None, Q, EMB, 100),
        abi.AllocEmb(None, Q, OUT, 50),
        abi.EmbedTxt(None, Q, (EMB, 0), prompt, 0),
        abi.Forward(1, Q, (EMB, 0, 100), [], (KV, 0, 100), (OUT, 0, 50)),
    )
    ran = sum(len(ints(step.positions)) for step in controller.collect())
    assert 50 < ran < 100, "some of its outputs have been made"
    peer.put(abi.Cancel(2, Q))
    assert outcome(controller, peer, 1) is errors.CancelledError
    assert controller.wait(peer, 2) is None
    peer.put(
        abi.EmbedTxt(None, Q, (EMB, 0), [999], 400),
        abi.AllocEmb(None, Q, 3, 1),
        abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, 100)], None, (3, 0, 1)),
        abi.Sample(3, Q, (3, 0), TOK),
    )
    assert attended(controller, peer, 3) == [*enumerate(prompt[:ran]), (400, 999)]
    last = ran - 51  # of the outputs, which are those of the inputs from 50 on
    peer.put(abi.Sample(4, Q, (OUT, last), TOK), abi.Sample(5, Q, (OUT, last + 1), TOK))
    assert controller.wait(peer, 4) == greedy(prompt[:ran], 1, VOCAB)[0]
    assert outcome(controller, peer, 5) is errors.UnwrittenError
    peer.put(
        abi.Synchronize(None, Q),
        abi.EmbedTxt(None, Q, (EMB, 0), prompt, 0),
        abi.Forward(None, Q, (EMB, 0, 100), [], (KV, 0, 100), (OUT, 0, 50)),
        abi.Sample(6, Q, (OUT, 49), TOK),
    )
    assert controller.wait(peer, 6) == greedy(prompt, 1, VOCAB)[0]


def test_cancelled_and_freed_are_answered_in_order(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    peer.put(*setup([1, 2], 8), abi.Sample(1, Q, (OUT, 0), TOK))
    controller.collect()
    peer.put(
        abi.Forward(2, Q, (EMB, 0, 1), [], None),
        abi.DeallocEmb(3, Q, EMB),
        abi.Forward(4, Q, (EMB, 0, 1), [], None),
        abi.Cancel(5, Q),
    )
    controller.collect()
    controller.serve()
    assert [outcome(controller, peer, i) for i in (2, 3, 4)] == [
        errors.CancelledError,
        None,
        errors.CancelledError,
    ]
    assert peer.order[-4:] == [1, 2, 3, 4]


def test_asking_for_more_pages_than_are_left_of_its_own_is_an_error(
    controller: ControllerProcess,
) -> None:
    """Nobody else holds any: there is nobody to end, least of all the one who asks."""
    _, peer = controller.admit(kv_pages=1000)
    peer.put(abi.CreateQueue(None, Q), abi.AllocKvPage(1, Q, KV, 40), abi.AllocKvPage(2, Q, 2, 30))
    assert outcome(controller, peer, 1) is None
    assert outcome(controller, peer, 2) is errors.OutOfMemoryError
