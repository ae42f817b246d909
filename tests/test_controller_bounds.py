"""What one inferlet can make the controller, or a step, carry: each has a bound."""

from __future__ import annotations

import pytest
from inferlet import abi, errors

from piehost.wire.step import StepDone

from .controller_process import VOCAB, AnswerError, ControllerProcess, Peer
from .test_controller_generation import EMB, KV, OUT, TOK, Q, chain, setup
from .test_controller_order import controller as controller
from .test_controller_order import outcome
from .toy_device import greedy, ints


def test_taking_and_freeing_pages_piles_nothing_up(controller: ControllerProcess) -> None:
    """Pages are cleared by the next step, and none comes while this goes on."""
    _, peer = controller.admit()
    peer.put(abi.CreateQueue(None, Q))
    for _ in range(10):
        peer.put(*[abi.AllocKvPage(None, Q, 9, 60), abi.DeallocKvPage(None, Q, 9)] * 200)
    peer.put(*setup([1, 2], 8)[1:], abi.Sample(1, Q, (OUT, 0), TOK))
    assert controller.wait(peer, 1) == greedy([1, 2], 1, VOCAB)[0]
    assert len(ints(controller.device.steps[-1].clear_pages)) <= 64


def test_handles_without_pages_have_a_cap(controller: ControllerProcess) -> None:
    _, peer = controller.admit(kv_pages=10)
    peer.put(abi.CreateQueue(None, Q))
    for kv in range(1, 11):
        peer.put(abi.AllocKvPage(None, Q, kv, 1), abi.DeallocKvPage(kv, Q, kv, 0, 1))
        peer.wait(kv)
    assert outcome(controller, peer, request(peer, abi.AllocKvPage(1, Q, 11, 1))) is (
        errors.QuotaError
    )


def request(peer: Peer, command: abi.Command) -> int:
    peer.put(command)
    assert command.req is not None
    return command.req


def test_a_forward_reads_no_more_slots_than_its_cap_of_pages_has(
    controller: ControllerProcess,
) -> None:
    _, peer = controller.admit(kv_pages=16)
    peer.put(*setup([1, 2, 3], 128), abi.EmbedTxt(None, Q, (EMB, 0), [9], 3))
    peer.put(abi.Forward(1, Q, (EMB, 0, 1), [(KV, 0, 128)] * 1024, None, (OUT, 0, 1)))
    assert outcome(controller, peer, 1) is errors.QuotaError
    peer.put(
        abi.Synchronize(None, Q),
        abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, 128)], None, (OUT, 0, 1)),
        abi.Sample(2, Q, (OUT, 0), TOK),
    )
    assert controller.wait(peer, 2) == greedy([1, 2, 3, 9], 1, VOCAB)[0]


def test_large_steps_are_bounded_and_always_leave() -> None:
    """Two steps of 2 MiB at once are more than the link takes while the backend does not read."""
    controller = ControllerProcess(pages=4096, policy="eager")
    _, peer = controller.admit(kv_pages=4096)
    for q in (1, 2):
        peer.put(
            abi.CreateQueue(None, q),
            abi.AllocKvPage(None, q, q, 2048),
            abi.AllocEmb(None, q, q, 1),
            abi.EmbedTxt(None, q, (q, 0), [7], 0),
        )
        both = [(q, 1, 2048 * 8 - 1), (q, 0, 2048 * 8)]
        peer.put(*[abi.Forward(None, q, (q, 0, 1), both)] * 20, abi.Synchronize(q, q))
    controller.collect()
    for q in (1, 2):
        controller.wait(peer, q)
    listed = [len(step.listed_slots) for step in controller.device.steps]
    assert max(listed) == 4 << 19 and sum(listed) == 4 * 40 * 2048 * 16
    controller.close()


def test_samples_of_one_inferlet_do_not_fill_a_step(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    peer.put(*setup([1, 2], 8), abi.Synchronize(1, Q))
    controller.wait(peer, 1)
    sample, dist = abi.Sample(None, Q, (OUT, 0), TOK), abi.GetNextDist(None, Q, (OUT, 0), 4, 0)
    peer.put(*[sample, dist] * 750)
    peer.put(*[sample, dist] * 750, abi.Synchronize(2, Q))
    controller.wait(peer, 2)
    steps = controller.device.steps
    assert max(len(ints(s.sample_rows)) + len(s.dists) for s in steps) == 1024
    assert sum(len(ints(s.sample_rows)) for s in steps) == 1500


def test_a_call_made_from_many_doubtful_tokens_waits_till_they_are_known(
    controller: ControllerProcess,
) -> None:
    """Each of 100 may be stopped, and so may the 100 made from all of them: who drops whom would
    take the controller n**3 looks, seconds for n = 1000."""
    _, peer = controller.admit(tokens=2000)
    n = 100
    peer.put(*setup([1, 2], 8), abi.AllocEmb(None, Q, 5, n), abi.AllocKvPage(None, Q, 5, 40))
    peer.put(*[abi.Sample(None, Q, (OUT, 0), 100 + i, stop=[VOCAB]) for i in range(n)])
    for at in range(3):
        peer.put(
            abi.EmbedTxt(None, Q, (5, 0), [~(100 + i) for i in range(n)], list(range(n))),
            abi.Forward(None, Q, (5, 0, n), [], (5, at * n, n), (5, 0, n)),
            *[abi.Sample(None, Q, (5, i), 100 + i, stop=[VOCAB]) for i in range(n)],
        )
    peer.put(abi.Synchronize(1, Q))
    assert controller.wait(peer, 1) is None
    assert all(token >= 0 for step in controller.device.steps for token in ints(step.tokens))


def test_answers_that_wait_for_a_step_count_as_queued(controller: ControllerProcess) -> None:
    seat, peer = controller.admit(commands=100)
    peer.put(*setup([1, 2], 8), abi.Sample(1, Q, (OUT, 0), TOK))
    controller.collect()
    for i in range(60):
        peer.put(abi.AllocEmb(100 + 2 * i, Q, 9, 1), abi.DeallocEmb(101 + 2 * i, Q, 9))
    controller.collect()
    assert controller.stats().seats[seat].queued == 100
    controller.serve()
    answers = [outcome(controller, peer, 100 + i) for i in range(120)]
    assert answers == [None] * 100 + [errors.QuotaError] * 20


def test_a_long_reason_of_the_backend_is_cut(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    peer.put(*setup([1, 2], 8), abi.Sample(1, Q, (OUT, 0), TOK))
    step = controller.collect().pop(0)
    controller.backend.send(StepDone(step.step, error="x" * 100_000))
    with pytest.raises(AnswerError) as caught:
        peer.wait(1)
    assert len(caught.value.message) == 1000


def test_a_text_that_the_tokenizer_refuses_is_an_error() -> None:
    """Some vocabularies have no token for what they do not know."""
    controller = ControllerProcess(unknown=False)
    _, peer = controller.admit()
    with pytest.raises(AnswerError) as caught:
        peer.ask(abi.Tokenize(1, 0, "nobody knows this"))
    assert caught.value.code == errors.ArgumentError.code
    assert peer.ask(abi.Tokenize(2, 0, "w1 w2")) == [1, 2]
    controller.close()


def test_a_prompt_is_not_held_up_by_anothers_endless_prompts(
    controller: ControllerProcess,
) -> None:
    _, hog = controller.admit()
    _, peer = controller.admit()
    hog.put(
        *setup([5] * 64, 64)[:-1],
        *[abi.Forward(i, Q, (EMB, 0, 64), [], (KV, 0, 64)) for i in range(50)],
    )
    controller.collect()
    prompt = list(range(60))
    peer.put(*setup(prompt, 64), abi.Sample(1, Q, (OUT, 0), TOK))
    assert controller.wait(peer, 1) == greedy(prompt, 1, VOCAB)[0]
    hog.ask(abi.Tokenize(99, 0, "w1"))  # what was answered before is here
    assert not hog.answered(10)
    controller.wait(hog, 49)


def test_a_forward_that_cannot_be_split_finds_room_beside_a_chain(
    controller: ControllerProcess,
) -> None:
    """More inputs than a step's prefill takes (32 here), and always some decode is older."""
    _, chained = controller.admit()
    _, peer = controller.admit()
    chained.put(*setup([1, 2], 64), *chain(2, 50, 100, []))
    controller.collect()
    n = 40
    mask = b"".join(((2 << i) - 1).to_bytes(5, "little") for i in range(n))
    prompt = list(range(n))
    peer.put(*setup(prompt, 64)[:-1])
    peer.put(abi.Forward(None, Q, (EMB, 0, n), [], (KV, 0, n), (OUT, 0, 1), None, mask))
    peer.put(abi.Sample(1, Q, (OUT, 0), TOK))
    assert controller.wait(peer, 1) == greedy(prompt, 1, VOCAB)[0]
    chained.ask(abi.Tokenize(99, 0, "w1"))
    assert not chained.answered(149)
    controller.wait(chained, 149)
