"""What the controller makes of correct programs: the tokens, and the shape of the steps.

A real controller process on real sockets; only the accelerator is a toy, whose tokens depend on
every slot an input attends to.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from inferlet import abi

from .controller_process import PAGE, VOCAB, ControllerProcess, Peer
from .controller_programs import EMB, KV, OUT, TOK, Q, chain, setup
from .toy_device import greedy, ints


@pytest.fixture
def controller() -> Iterator[ControllerProcess]:
    process = ControllerProcess()
    yield process
    process.close()


def generate(
    controller: ControllerProcess, peer: Peer, prompt: list[int], count: int, stop: list[int]
) -> list[int | None]:
    peer.put(*setup(prompt, len(prompt) + count), *chain(len(prompt), count, 100, stop))
    peer.put(abi.Synchronize(99, Q))
    assert controller.wait(peer, 99) is None
    return [peer.wait(100 + i) for i in range(count)]


def test_a_chain_of_late_bound_tokens_equals_plain_generation(
    controller: ControllerProcess,
) -> None:
    _, peer = controller.admit()
    prompt = [5, 6, 7, 8, 9]
    assert generate(controller, peer, prompt, 30, []) == greedy(prompt, 30, VOCAB)
    assert all(not step.listed_inputs for step in controller.device.steps), "plain page runs only"


def test_answers_of_a_chain_come_several_a_frame(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    generate(controller, peer, [1, 2, 3], 40, [])
    assert peer.frames <= 40 / 2


def test_the_next_step_leaves_before_the_last_is_answered(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    peer.put(*setup([1, 2, 3], 20), *chain(3, 10, 100, []))
    steps = controller.collect()
    assert [s.step for s in steps] == [1, 2], "one runs, one waits behind it"
    late = ints(steps[1].tokens)
    assert late == [~(1 * 4096 + 0)], "its input is sample 0 of step 1, still unknown to us"
    controller.serve(2)


def test_programs_that_see_each_token_do_not_fragment_the_batch(
    controller: ControllerProcess,
) -> None:
    """Without late tokens a second step waits, so that everybody gathers in the next one."""
    peers = [controller.admit()[1] for _ in range(4)]
    for peer in peers[:1]:
        peer.put(*setup([1, 2], 20), abi.Sample(1, Q, (OUT, 0), TOK))
    assert len(controller.collect()) == 1
    for peer in peers[1:]:
        peer.put(*setup([1, 2], 20), abi.Sample(1, Q, (OUT, 0), TOK))
    assert len(controller.collect()) == 1, "the first step is unanswered"
    controller.serve()
    steps = controller.collect()
    assert len(steps) == 1 and len(ints(steps[0].paged_inputs)) == 3
    controller.serve()


@pytest.mark.parametrize("hit", [0, 1, 2, 7, 19])
def test_a_stop_token_drops_the_rest_of_the_chain(controller: ControllerProcess, hit: int) -> None:
    prompt = [11, 12, 13]
    reference = greedy(prompt, 20, VOCAB)
    assert len(set(reference)) == 20, "the toy model does not repeat itself here"
    _, peer = controller.admit()
    got = generate(controller, peer, prompt, 20, [reference[hit]])
    assert got == [*reference[: hit + 1], *[None] * (19 - hit)]


@pytest.mark.parametrize("hit", [0, 3, 9])
def test_after_a_stop_the_kv_is_as_if_the_dropped_steps_never_ran(
    controller: ControllerProcess, hit: int
) -> None:
    """Reads every slot afterwards, also those that a dropped step had already written."""
    prompt = [21, 22, 23]
    reference = greedy(prompt, 10, VOCAB)
    _, peer = controller.admit()
    generate(controller, peer, prompt, 10, [reference[hit]])
    kept = prompt + reference[:hit]
    peer.put(
        abi.EmbedTxt(None, Q, (EMB, 0), [777], 15),
        abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, 14)], (KV, 15, 1), (OUT, 0, 1)),
        abi.Sample(1, Q, (OUT, 0), TOK),
    )
    controller.wait(peer, 1)
    attended = controller.device.rows[ints(controller.device.steps[-1].sample_rows)[0]]
    assert sorted(attended) == [*enumerate(kept), (15, 777)]


def test_generation_goes_on_after_a_stop(controller: ControllerProcess) -> None:
    prompt = [31, 32]
    reference = greedy(prompt, 30, VOCAB)
    _, peer = controller.admit()
    got = generate(controller, peer, prompt, 12, [reference[4]])
    assert got[:5] == reference[:5] and got[5] is None
    at = len(prompt) + 4  # slots written: the prompt and the tokens before the stop
    peer.put(
        abi.EmbedTxt(None, Q, (EMB, 0), [reference[4]], at),
        abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, at)], (KV, at, 1), (OUT, 0, 1)),
        *chain(at + 1, 5, 200, []),
        abi.Synchronize(300, Q),
    )
    controller.wait(peer, 300)
    assert [peer.wait(200 + i) for i in range(5)] == reference[5:10]


def test_a_long_prefill_is_chunked_and_decodes_go_on_beside_it() -> None:
    controller = ControllerProcess(chunk=32)
    _, decoder = controller.admit()
    _, filler = controller.admit()
    decoder.put(*setup([1, 2, 3], 100), *chain(3, 60, 100, []))
    prompt = list(range(100, 300))
    filler.put(*setup(prompt, 250), abi.Sample(1, Q, (OUT, 0), TOK))
    assert controller.wait(filler, 1) == greedy(prompt, 1, VOCAB)[0]
    mixed = [s for s in controller.device.steps if max(ints(s.paged_inputs), default=0) > 1]
    assert len(mixed) >= 200 // 32
    assert all(sum(n for n in ints(s.paged_inputs) if n > 16) <= 32 for s in mixed)
    decoding = [s for s in mixed if 1 in ints(s.paged_inputs)]
    assert len(decoding) >= len(mixed) - 2, "decodes are in (nearly) every chunk's step"
    decoder.put(abi.Synchronize(99, Q))
    controller.wait(decoder, 99)
    assert [decoder.wait(100 + i) for i in range(60)] == greedy([1, 2, 3], 60, VOCAB)
    controller.close()


def test_sixty_four_programs_share_steps(controller: ControllerProcess) -> None:
    controller.close()
    controller.__init__(pages=600)  # type: ignore[misc]
    peers = [controller.admit()[1] for _ in range(64)]
    for i, peer in enumerate(peers):
        prompt = [i + 1] * (1 + i % 5)
        peer.put(*setup(prompt, 40), *chain(len(prompt), 20, 100, []), abi.Synchronize(99, Q))
    controller.collect()  # the first steps are unanswered until everybody has come
    for i, peer in enumerate(peers):
        controller.wait(peer, 99)
        prompt = [i + 1] * (1 + i % 5)
        assert [peer.wait(100 + k) for k in range(20)] == greedy(prompt, 20, VOCAB)
    total = controller.stats().total
    assert total.decode_segments / total.decode_steps >= 40


def test_eager_sends_every_queue_by_itself() -> None:
    controller = ControllerProcess(policy="eager")
    peers = [controller.admit()[1] for _ in range(3)]
    for peer in peers:
        peer.put(*setup([1, 2], 20), abi.Sample(1, Q, (OUT, 0), TOK))
    for peer in peers:
        assert controller.wait(peer, 1) == greedy([1, 2], 1, VOCAB)[0]
    assert all(len(ints(s.paged_inputs)) == 1 for s in controller.device.steps)
    controller.close()


def test_higher_priority_goes_first(controller: ControllerProcess) -> None:
    """Prefills beyond one step's budget: the later but more urgent queue is filled first."""
    _, busy = controller.admit()
    busy.put(*setup([1], 8), abi.Sample(1, Q, (OUT, 0), TOK))
    controller.collect()
    peers = [controller.admit()[1] for _ in range(2)]
    for i, peer in enumerate(peers):
        peer.put(abi.CreateQueue(None, Q), abi.SetQueuePriority(1, Q, i))
        peer.wait(1)
        peer.put(*setup([50 + i] * 60, 64)[1:], abi.Sample(2, Q, (OUT, 0), TOK))
        peer.ask(abi.Tokenize(3, 0, "w1"))  # the controller has read what came before
    controller.serve()
    controller.wait(peers[1], 2)
    assert not peers[0].answered(2)
    controller.wait(peers[0], 2)
    order = [ints(s.tokens)[0] for s in controller.device.steps[1:] if s.tokens]
    assert order[0] == 51


def test_masks_decide_alone_but_never_show_unwritten_slots(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    peer.put(*setup([1, 2, 3, 4], 16))
    # columns: slots 0..5 (4 and 5 unwritten), then the input; allow 1, 3, 4 and itself
    mask = bytes([0b1011010])
    peer.put(
        abi.EmbedTxt(None, Q, (EMB, 0), [9], 6),
        abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, 6)], (KV, 6, 1), (OUT, 0, 1), mask=mask),
        abi.Sample(1, Q, (OUT, 0), TOK),
    )
    controller.wait(peer, 1)
    attended = controller.device.rows[ints(controller.device.steps[-1].sample_rows)[0]]
    assert sorted(attended) == [(1, 2), (3, 4), (6, 9)]


def test_hidden_slots_are_not_attended_and_come_back(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    peer.put(*setup([1, 2, 3, 4], 32))
    for request, visible, expected in (
        (1, False, [(0, 1), (3, 4)]),
        (2, True, [*enumerate([1, 2, 3, 4])]),
    ):
        peer.put(
            abi.MaskKvPage(None, Q, (KV, 1, 2), visible),
            abi.EmbedTxt(None, Q, (EMB, 0), [9], 10),
            abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, 4)], None, (OUT, 0, 1)),
            abi.Sample(request, Q, (OUT, 0), TOK),
        )
        controller.wait(peer, request)
        attended = controller.device.rows[ints(controller.device.steps[-1].sample_rows)[0]]
        assert sorted(attended) == [*expected, (10, 9)]


def test_a_fork_shares_full_pages_and_copies_the_tail(controller: ControllerProcess) -> None:
    _, peer = controller.admit()
    prompt = list(range(40, 40 + PAGE + 3))
    peer.put(*setup(prompt, 32), abi.Sample(1, Q, (OUT, 0), TOK))
    first = controller.wait(peer, 1)
    n, tail = len(prompt), 3
    held = controller.stats().total.pages_free
    peer.put(
        abi.ShareKvPage(None, Q, 5, KV, 0, 1),
        abi.AllocKvPage(None, Q, 6, 2),
        abi.CopyKvPage(None, Q, (KV, PAGE, tail), (6, 0, tail)),
        abi.EmbedTxt(None, Q, (EMB, 0), [first], n),
        abi.Forward(None, Q, (EMB, 0, 1), [(5, 0, PAGE), (6, 0, tail)], (6, tail, 1), (OUT, 0, 1)),
        abi.Sample(2, Q, (OUT, 0), TOK),
    )
    assert controller.wait(peer, 2) == greedy(prompt, 2, VOCAB)[1]
    last = controller.device.steps[-1]
    assert last.paged_inputs and not last.listed_inputs, "a fork is still a plain page run"
    assert controller.stats().total.pages_free == held - 2, "the shared page costs nothing"
    peer.put(abi.DeallocKvPage(None, Q, KV), abi.DeallocKvPage(3, Q, 6))
    controller.wait(peer, 3)
    total = controller.stats().total
    assert total.pages_free == total.pages_total - 1, "the shared page lives in its last handle"


def test_freed_pages_come_back_unwritten(controller: ControllerProcess) -> None:
    _, first = controller.admit()
    seat = 1
    first.put(*setup([1, 2, 3], 8 * 64), abi.Sample(1, Q, (OUT, 0), TOK))
    controller.wait(first, 1)
    assert controller.release(seat).stats.tokens_out == 1
    _, second = controller.admit()
    second.put(*setup([7], 8 * 64))
    second.put(
        abi.EmbedTxt(None, Q, (EMB, 0), [9], 100),
        abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, 511)], None, (OUT, 0, 1)),
        abi.Sample(1, Q, (OUT, 0), TOK),
    )
    controller.wait(second, 1)
    attended = controller.device.rows[ints(controller.device.steps[-1].sample_rows)[0]]
    assert sorted(attended) == [(0, 7), (100, 9)]
