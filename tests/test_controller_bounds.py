"""What one inferlet can make the controller, or a step, carry: each has a bound."""

from __future__ import annotations

import signal

import psutil
import pytest
from inferlet import abi, errors

from piehost.wire.step import StepDone

from . import controller_fixtures
from .controller_answers import outcome
from .controller_process import VOCAB, AnswerError, ControllerProcess, Peer
from .controller_programs import EMB, KV, OUT, SPIN, TOK, Q, chain, chats, setup
from .toy_device import greedy, ints

controller = controller_fixtures.audited  # the fixture


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


TOKENS = 20_000
LARGE: list[abi.Command] = [
    abi.EmbedTxt(None, Q, (EMB, 0), [300] * TOKENS, 0),
    abi.EmbedTxt(None, Q, (EMB, 0), [300], [300] * TOKENS),
    abi.Forward(None, Q, (EMB, 0, 1), [], positions=[300] * TOKENS),
    abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, 1)] * 1024, mask=bytes(40_000)),
    abi.Sample(None, Q, (OUT, 0), TOK, bias=[(300, 1.0)] * 1024, stop=[300] * 64),
    abi.AllocHistory(None, Q, 1, [300] * TOKENS),
    abi.ExtendHistory(None, Q, 1, [300] * TOKENS),
    abi.ExportKvPage(None, Q, "a", [(KV, 0, 1)] * 1024, bytes(40_000)),
    abi.WriteEmb(None, Q, (EMB, 0, 1), 0, [300] * TOKENS),
]


@pytest.mark.parametrize("command", LARGE, ids=lambda c: f"{type(c).__name__}")
def test_large_commands_that_wait_have_a_bound_together(
    controller: ControllerProcess, command: abi.Command
) -> None:
    """Decoded, a frame of numbers takes ten times its size: thousands of them, gigabytes."""
    seat, peer = controller.admit()
    peer.put(*setup([1, 2], 8), abi.Sample(None, Q, (OUT, 0), TOK), abi.Synchronize(None, Q))
    controller.collect()
    before = resident(controller)
    for _ in range(400):
        peer.put(command)
    controller.collect()
    assert resident(controller) - before < 40 << 20
    assert controller.stats().seats[seat].queued < 400
    controller.serve()
    peer.put(abi.Synchronize(2, Q))
    outcome(controller, peer, 2)  # the error, if those taken were wrong
    peer.put(abi.EmbedTxt(3, Q, (EMB, 0), [9], 2))
    assert outcome(controller, peer, 3) is None  # what was taken or dropped counts no more


def resident(controller: ControllerProcess) -> int:
    """Octets."""
    return psutil.Process(controller.process.pid).memory_info().rss


def test_cancelled_commands_count_no_more(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    peer.put(*setup([1, 2], 8), abi.Sample(None, Q, (OUT, 0), TOK))
    controller.collect()
    large = abi.EmbedTxt(None, Q, (EMB, 0), [300] * TOKENS, 0)
    for _ in range(3):
        peer.put(abi.Synchronize(None, Q))  # holds up those behind it
        for _ in range(16):
            peer.put(large)
        peer.put(abi.Cancel(None, Q))
    peer.put(abi.Synchronize(2, Q))
    controller.collect()
    controller.serve()
    assert outcome(controller, peer, 2) is None  # never beyond the bound


def test_many_pages_taken_and_freed_hold_up_their_inferlet_not_others() -> None:
    """A thousand pages each time: without turns, all before anybody else is heard."""
    controller = ControllerProcess(pages=1024)
    _, peer = controller.admit(kv_pages=1024)
    pair = [abi.AllocKvPage(None, Q, KV, 1000), abi.DeallocKvPage(None, Q, KV)]
    peer.put(
        abi.CreateQueue(None, Q), *pair * 1000, abi.Synchronize(1, Q), abi.Tokenize(2, 0, "w1")
    )
    assert peer.wait(2, timeout=60) == [1]
    assert peer.wait(1, timeout=60) is None
    assert peer.order == [2, 1]
    controller.close()


def test_the_vectors_that_all_inferlets_move_in_a_step_are_bounded() -> None:
    controller = ControllerProcess()
    peers = [controller.admit()[1] for _ in range(8)]
    for peer in peers:
        peer.put(
            abi.CreateQueue(None, Q),
            abi.AllocEmb(None, Q, EMB, 1000),
            abi.EmbedTxt(None, Q, (EMB, 0), [1] * 500, 0),
        )
    controller.collect()
    for peer in peers:
        peer.put(*[abi.ReadEmb(i, Q, (EMB, 0, 500), 0) for i in (1, 2)])
    for peer in peers:
        assert controller.wait(peer, 2) == 500
    assert max(len(ints(s.embed_from)) for s in controller.device.steps) <= 4096
    controller.close()


def test_the_entries_of_distributions_in_a_step_are_bounded() -> None:
    """Of a real vocabulary a distribution has 1 MB, so that 1,024 would be a gigabyte."""
    controller = ControllerProcess()
    peers = [controller.admit(kv_pages=1)[1] for _ in range(5)]
    for peer in peers:
        peer.put(*setup([1, 2], 8), abi.Synchronize(1, Q))
        controller.wait(peer, 1)
    held, _ = controller.admit()[1], controller.collect()
    held.put(*setup([1, 2], 8), abi.Sample(None, Q, (OUT, 0), TOK))
    controller.collect()  # a step that is not answered before all have asked
    for peer in peers:
        peer.put(*[abi.GetNextDist(None, Q, (OUT, 0), VOCAB, 0)] * 300)
        sample = abi.Sample(None, Q, (OUT, 0), TOK, k=VOCAB)
        peer.put(*[sample] * 100, abi.Synchronize(2, Q))
    controller.collect()
    for peer in peers:
        assert controller.wait(peer, 2) is None
    steps = controller.device.steps
    assert sum(len(step.dists) for step in steps) == 5 * 400
    entries = [sum(k for _, k, _, _ in step.dists) for step in steps]
    assert 1 << 19 < max(entries) <= 1 << 20  # 341 of one inferlet's
    controller.close()


def test_small_frames_that_arrive_together_are_carried_out_in_turns() -> None:
    controller = ControllerProcess(chat_template=SPIN)
    _, peer = controller.admit()
    peer.ask(abi.Tokenize(99, 0, "w1"))
    n = 12
    peer.sock.sendall(chats(n))
    assert outcome(controller, peer, n - 1) is errors.ArgumentError
    assert peer.frames > n // 2  # not all answers at once, in one frame
    controller.close()


def test_those_with_much_left_to_do_take_turns_so_that_others_wait_for_one_of_them() -> None:
    controller = ControllerProcess(chat_template=SPIN)
    hogs = [controller.admit()[1] for _ in range(8)]
    _, peer = controller.admit()
    peer.ask(abi.Tokenize(1, 0, "w1"))
    for hog in hogs:
        hog.sock.sendall(chats(6))
    for i in range(2, 6):
        peer.ask(abi.Tokenize(i, 0, "w1"))
    controller.process.send_signal(signal.SIGSTOP)
    answered = sum(len(hog.arrived()) for hog in hogs)
    controller.process.send_signal(signal.SIGCONT)
    assert answered <= 24  # the first of each at once; else 8 for each that `peer` asked
    controller.close()
