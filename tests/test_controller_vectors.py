"""Vectors in and out: write_emb, read_emb, hidden states as inputs, and what goes wrong."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from inferlet import abi, errors

from . import controller_fixtures
from .controller_answers import outcome
from .controller_process import VOCAB, ControllerProcess, Peer
from .controller_programs import EMB, KV, OUT, TOK, Q, setup
from .toy_device import VECTOR_BYTES, embedding, greedy, ints, next_token, token_of, vector

controller = controller_fixtures.audited  # the fixture

V1, V2 = struct.pack("<4f", 1, -2, 0.5, -0.0), struct.pack("<4f", 1e-40, 3e38, 7, 8)
NAN = struct.pack("<4f", 1, float("nan"), 0, 0)
VEC = 3  # an emb of four


def admit(controller: ControllerProcess, prompt: list[int], slots: int = 32, **limits: Any) -> Peer:
    """With `VEC`, and ring in holding V1, V2, NAN, V1."""
    number, peer = controller.admit(**limits)
    controller.device.rings_in[number][: 4 * VECTOR_BYTES] = V1 + V2 + NAN + V1
    peer.put(*setup(prompt, slots), abi.AllocEmb(None, Q, VEC, 4), abi.Synchronize(99, Q))
    assert controller.wait(peer, 99) is None
    return peer


def ring_out(controller: ControllerProcess, offset: int, count: int) -> bytes:
    """Vectors in the first inferlet's ring."""
    return bytes(controller.device.rings_out[1][offset : offset + count * VECTOR_BYTES])


def test_what_is_written_is_read_back_bit_by_bit(controller: ControllerProcess) -> None:
    peer = admit(controller, [1])
    peer.put(
        abi.WriteEmb(1, Q, (VEC, 1, 2), 0, 5),
        abi.ReadEmb(2, Q, (VEC, 1, 2), 64),
    )
    assert controller.wait(peer, 2) == 2
    assert peer.wait(1) is None
    assert ring_out(controller, 64, 2) == V1 + V2


def test_reading_text_gives_its_embedding_and_waits_for_a_late_token(
    controller: ControllerProcess,
) -> None:
    peer = admit(controller, [1, 2])
    peer.put(
        abi.Sample(1, Q, (OUT, 0), TOK),
        abi.EmbedTxt(None, Q, (VEC, 0), [9, ~TOK], 0),
        abi.ReadEmb(2, Q, (VEC, 0, 2), 0),
    )
    assert controller.wait(peer, 2) == 2
    assert ring_out(controller, 0, 2) == embedding(9) + embedding(peer.wait(1))


def test_a_hidden_state_that_goes_out_and_comes_back_is_the_same(
    controller: ControllerProcess,
) -> None:
    peer = admit(controller, [4, 5, 6])
    peer.put(abi.ReadEmb(1, Q, (OUT, 0, 1), 128))
    assert controller.wait(peer, 1) == 1
    data = ring_out(controller, 128, 1)
    assert data == vector(tuple(enumerate([4, 5, 6])))
    controller.device.rings_in[1][512 : 512 + VECTOR_BYTES] = data
    peer.put(abi.WriteEmb(None, Q, (VEC, 0, 1), 512, 2), abi.Sample(2, Q, (VEC, 0), TOK))
    assert controller.wait(peer, 2) == greedy([4, 5, 6], 1, VOCAB)[0]


def test_vectors_text_and_late_tokens_are_inputs_of_one_forward(
    controller: ControllerProcess,
) -> None:
    peer = admit(controller, [1, 2])
    peer.put(
        abi.Sample(1, Q, (OUT, 0), TOK),
        abi.WriteEmb(None, Q, (VEC, 0, 2), 0, [3, 4]),
        abi.EmbedTxt(None, Q, (VEC, 2), [~TOK, 7], 5),
        abi.Forward(None, Q, (VEC, 0, 4), [(KV, 0, 2)], (KV, 2, 4), (OUT, 0, 1)),
        abi.Sample(2, Q, (OUT, 0), 9),
    )
    got = controller.wait(peer, 2)
    seen = [(0, 1), (1, 2), (3, V1), (4, V2), (5, peer.wait(1)), (6, 7)]
    assert got == next_token(tuple(seen), VOCAB)


def test_a_soft_prompt_takes_one_step_from_ring_in_to_ring_out(
    controller: ControllerProcess,
) -> None:
    peer = admit(controller, [1])
    peer.put(
        abi.WriteEmb(None, Q, (VEC, 0, 2), 0),
        abi.Forward(None, Q, (VEC, 0, 2), [], (KV, 8, 2), (VEC, 0, 2)),
        abi.Sample(1, Q, (VEC, 1), TOK),
        abi.ReadEmb(2, Q, (VEC, 0, 2), 0),
    )
    assert len(controller.collect()) == 1
    assert controller.wait(peer, 2) == 2
    first, second = vector(((0, V1),)), vector(((0, V1), (1, V2)))
    assert peer.wait(1) == token_of(second, VOCAB)
    assert ring_out(controller, 0, 2) == first + second


@pytest.mark.parametrize("positions", [None, [30]])
def test_a_hidden_state_as_input_has_the_position_it_came_from(
    controller: ControllerProcess, positions: list[int] | None
) -> None:
    """And its step leaves before the one that makes it is answered."""
    peer = admit(controller, [1, 2, 3])
    peer.put(
        abi.EmbedTxt(None, Q, (EMB, 0), [9], 20),
        abi.Forward(None, Q, (EMB, 0, 1), [], None, (OUT, 0, 1)),
        abi.Forward(None, Q, (OUT, 0, 1), [(KV, 0, 3)], (KV, 3, 1), (OUT, 0, 1), positions),
        abi.Sample(1, Q, (OUT, 0), TOK),
    )
    assert len(controller.collect()) == 2, "the row is filled at the end of the first step"
    own = (20 if positions is None else 30, vector(((20, 9),)))
    assert controller.wait(peer, 1) == next_token(((0, 1), (1, 2), (2, 3), own), VOCAB)


def test_a_latent_chain_of_forwards_feeds_on_itself(controller: ControllerProcess) -> None:
    peer = admit(controller, [1, 2, 3])
    peer.put(
        *[
            abi.Forward(None, Q, (OUT, 0, 1), [(KV, 0, i)], (KV, i, 1), (OUT, 0, 1), [i])
            for i in range(3, 9)
        ],
        abi.Sample(1, Q, (OUT, 0), TOK),
    )
    seen: list[tuple[int, int | bytes]] = [*enumerate([1, 2, 3])]
    for i in range(3, 9):
        seen.append((i, vector(tuple(seen))))
    assert controller.wait(peer, 1) == next_token(tuple(seen), VOCAB)


def test_filling_an_embed_anew_does_not_reach_a_forward_before_it(
    controller: ControllerProcess,
) -> None:
    """Vectors come in before the forwards of a step: the row must be another one."""
    peer = admit(controller, [1])
    peer.put(abi.WriteEmb(1, Q, (VEC, 0, 1), 0))
    controller.wait(peer, 1)
    peer.put(
        abi.Forward(None, Q, (VEC, 0, 1), [], None, (OUT, 0, 1)),
        abi.WriteEmb(None, Q, (VEC, 0, 1), VECTOR_BYTES),
        abi.Sample(2, Q, (OUT, 0), TOK),
        abi.Sample(3, Q, (VEC, 0), TOK),
    )
    assert len(controller.collect()) == 1
    assert controller.wait(peer, 2) == next_token(((0, V1),), VOCAB)
    assert controller.wait(peer, 3) == token_of(V2, VOCAB)


def test_a_long_forward_of_vectors_runs_in_pieces(controller: ControllerProcess) -> None:
    peer = admit(controller, [5] * 100, 256)
    peer.put(
        abi.Forward(None, Q, (EMB, 0, 100), [], (KV, 0, 100), (EMB, 0, 100)),
        abi.Forward(None, Q, (EMB, 0, 100), [], (KV, 100, 100), (EMB, 0, 100)),
        abi.Sample(1, Q, (EMB, 99), TOK),
    )
    first = [vector(tuple((p, 5) for p in range(i + 1))) for i in range(100)]
    assert controller.wait(peer, 1) == next_token(tuple(enumerate(first)), VOCAB)
    assert len([s for s in controller.device.steps if s.vector_inputs]) == 4, "32 a step"


@pytest.mark.parametrize("how", ["freed", "filled"])
def test_vectors_taken_away_under_a_forward_end_it(controller: ControllerProcess, how: str) -> None:
    peer = admit(controller, [5] * 100, 256)
    peer.put(
        abi.CreateQueue(None, 2),
        abi.Forward(1, Q, (EMB, 0, 100), [], (KV, 0, 100), (EMB, 0, 100)),
    )
    controller.wait(peer, 1)
    peer.put(abi.Forward(2, Q, (EMB, 0, 100), [], (KV, 100, 100)))
    controller.collect()
    taken = abi.DeallocEmb(3, 2, EMB) if how == "freed" else abi.EmbedTxt(3, 2, (EMB, 99), [1], 0)
    peer.ask(taken)
    assert outcome(controller, peer, 2) is errors.HandleError


# --- stopped --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", [False, True])
def test_what_comes_of_a_stopped_token_is_dropped_as_a_vector_too(
    controller: ControllerProcess, wait: bool
) -> None:
    first = greedy([1, 2], 1, VOCAB)[0]
    peer = admit(controller, [1, 2])
    peer.put(abi.Sample(1, Q, (OUT, 0), TOK, stop=[first]))
    if wait:
        assert controller.wait(peer, 1) == first
    peer.put(
        abi.EmbedTxt(None, Q, (VEC, 0), [~TOK], 2),
        abi.ReadEmb(2, Q, (VEC, 0, 1), 0),
        abi.Forward(None, Q, (VEC, 0, 1), [(KV, 0, 2)], (KV, 2, 1), (VEC, 1, 1)),
        abi.ReadEmb(3, Q, (VEC, 1, 1), 0),
        abi.Forward(None, Q, (VEC, 1, 1), [(KV, 0, 3)], (KV, 3, 1), (VEC, 2, 1)),
        abi.Sample(4, Q, (VEC, 2), TOK),
    )
    assert [outcome(controller, peer, i) for i in (2, 3, 4)] == [None] * 3


# --- vectors that are refused ---------------------------------------------------------------------


def test_vectors_that_are_not_finite_stop_their_queue(controller: ControllerProcess) -> None:
    """Commands of the same step and of the next, which is on its way, fail with it."""
    peer = admit(controller, [1, 2])
    _, other = controller.admit()
    peer.put(
        abi.WriteEmb(1, Q, (VEC, 0, 3), 0),
        abi.Forward(2, Q, (VEC, 0, 3), [], (KV, 8, 3), (OUT, 0, 1)),
        abi.Sample(3, Q, (OUT, 0), TOK),
        abi.ReadEmb(4, Q, (OUT, 0, 1), 0),
        abi.EmbedTxt(5, Q, (VEC, 0), [~TOK], 3),
        abi.Forward(6, Q, (VEC, 0, 1), [(KV, 8, 3)], (KV, 11, 1), (OUT, 0, 1)),
        abi.GetNextDist(7, Q, (OUT, 0), 4, 0),
        abi.DeallocEmb(8, Q, EMB),
        abi.Synchronize(9, Q),
        abi.Synchronize(10, Q),
    )
    assert len(controller.collect()) == 2
    other.put(*setup([4, 5], 8), abi.Sample(1, Q, (OUT, 0), TOK))
    answers = [outcome(controller, peer, i) for i in range(1, 11)]
    assert answers == [errors.ArgumentError] * 7 + [None, errors.ArgumentError, None]
    assert controller.wait(other, 1) == greedy([4, 5], 1, VOCAB)[0]


def test_after_a_refusal_what_was_to_be_filled_is_unwritten(
    controller: ControllerProcess,
) -> None:
    """Embeds, the token, and the slots that ran on zeros in place of the vectors."""
    peer = admit(controller, [1, 2], slots=16)
    peer.put(
        abi.WriteEmb(None, Q, (VEC, 2, 1), 2 * VECTOR_BYTES),
        abi.Forward(None, Q, (VEC, 2, 1), [(KV, 0, 2)], (KV, 2, 1), (OUT, 0, 1)),
        abi.Sample(None, Q, (OUT, 0), TOK),
        abi.Synchronize(1, Q),
    )
    assert outcome(controller, peer, 1) is errors.ArgumentError
    tries: list[tuple[int, abi.Command]] = [
        (2, abi.ReadEmb(2, Q, (VEC, 2, 1), 0)),
        (3, abi.Sample(3, Q, (OUT, 0), TOK)),
        (4, abi.EmbedTxt(4, Q, (VEC, 0), [~TOK], 0)),
    ]
    for request, command in tries:
        peer.put(command, abi.Synchronize(None, Q))
        assert outcome(controller, peer, request) is errors.UnwrittenError
    peer.put(
        abi.EmbedTxt(None, Q, (EMB, 0), [9], 8),
        abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, 8)], (KV, 8, 1), (OUT, 0, 1)),
        abi.Sample(5, Q, (OUT, 0), TOK),
    )
    assert controller.wait(peer, 5) == next_token(((0, 1), (1, 2), (8, 9)), VOCAB)


def test_a_forward_overwrites_nothing_before_its_vectors_are_known_to_be_right(
    controller: ControllerProcess,
) -> None:
    peer = admit(controller, [1, 2, 3], slots=8)
    peer.put(
        abi.WriteEmb(None, Q, (VEC, 0, 1), 2 * VECTOR_BYTES),
        abi.EmbedTxt(None, Q, (EMB, 0), [7], 0),
        abi.Forward(None, Q, (EMB, 0, 1), [], (KV, 0, 1)),
        abi.Synchronize(1, Q),
        abi.EmbedTxt(None, Q, (EMB, 0), [9], 3),
        abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, 3)], None, (OUT, 0, 1)),
        abi.Sample(2, Q, (OUT, 0), TOK),
    )
    assert outcome(controller, peer, 1) is errors.ArgumentError
    assert controller.wait(peer, 2) == greedy([1, 2, 3, 9], 1, VOCAB)[0]


def test_what_failed_behind_a_refusal_has_not_happened(controller: ControllerProcess) -> None:
    """Pages, embeds and histories are made under the same handles afterwards."""
    peer = admit(controller, [1, 2, 3], slots=8)
    made: list[Any] = [
        abi.AllocKvPage(2, Q, 7, 1),
        abi.ShareKvPage(3, Q, 8, KV, 0, 1),
        abi.AllocEmb(4, Q, 7, 1),
        abi.AllocHistory(5, Q, 7),
    ]
    peer.put(abi.WriteEmb(1, Q, (VEC, 0, 1), 2 * VECTOR_BYTES), *made)
    peer.put(abi.CopyKvPage(6, Q, (KV, 0, 1), (KV, 1, 1)), abi.MaskKvPage(7, Q, (KV, 0, 3), False))
    for request in range(1, 8):
        assert outcome(controller, peer, request) is errors.ArgumentError
    peer.put(abi.Synchronize(None, Q), *made)
    assert [outcome(controller, peer, request) for request in range(2, 6)] == [None] * 4
    peer.put(
        abi.EmbedTxt(None, Q, (EMB, 0), [9], 3),
        abi.Forward(None, Q, (EMB, 0, 1), [(KV, 0, 3)], None, (OUT, 0, 1)),
        abi.Sample(8, Q, (OUT, 0), TOK),
    )
    assert controller.wait(peer, 8) == greedy([1, 2, 3, 9], 1, VOCAB)[0]


# --- wrong commands -------------------------------------------------------------------------------

WRONG: dict[str, tuple[type[errors.InferletError], abi.Command]] = {
    "read, no such emb": (errors.HandleError, abi.ReadEmb(9, Q, (77, 0, 1), 0)),
    "read beyond": (errors.SpanError, abi.ReadEmb(9, Q, (VEC, 3, 2), 0)),
    "read of none": (errors.SpanError, abi.ReadEmb(9, Q, (VEC, 0, 0), 0)),
    "read unwritten": (errors.UnwrittenError, abi.ReadEmb(9, Q, (VEC, 0, 1), 0)),
    "read, ring alignment": (errors.ArgumentError, abi.ReadEmb(9, Q, (OUT, 0, 1), 6)),
    "read, ring range": (errors.ArgumentError, abi.ReadEmb(9, Q, (OUT, 0, 1), 65536 - 12)),
    "read, ring offset 2**32-4": (errors.ArgumentError, abi.ReadEmb(9, Q, (OUT, 0, 1), 2**32 - 4)),
    "write, no such emb": (errors.HandleError, abi.WriteEmb(9, Q, (77, 0, 1), 0)),
    "write beyond": (errors.SpanError, abi.WriteEmb(9, Q, (VEC, 3, 2), 0)),
    "write of none": (errors.SpanError, abi.WriteEmb(9, Q, (VEC, 0, 0), 0)),
    "write, ring alignment": (errors.ArgumentError, abi.WriteEmb(9, Q, (VEC, 0, 1), 2)),
    "write, ring range": (errors.ArgumentError, abi.WriteEmb(9, Q, (VEC, 0, 2), 4096 - 16)),
    "write, positions": (errors.PositionError, abi.WriteEmb(9, Q, (VEC, 0, 2), 0, [1])),
    "write, beyond the context": (errors.PositionError, abi.WriteEmb(9, Q, (VEC, 0, 2), 0, 511)),
    "write, not finite": (errors.ArgumentError, abi.WriteEmb(9, Q, (VEC, 0, 3), 0)),
    "forward of nothing": (errors.UnwrittenError, abi.Forward(9, Q, (VEC, 0, 1), [])),
    "sample of text": (errors.UnwrittenError, abi.Sample(9, Q, (EMB, 0), TOK)),
    "dist of text": (errors.UnwrittenError, abi.GetNextDist(9, Q, (EMB, 0), 4, 0)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_command_is_a_typed_error_and_the_queue_recovers(
    controller: ControllerProcess, name: str
) -> None:
    expected, wrong = WRONG[name]
    peer = admit(controller, [1, 2], ring_in_bytes=4096)
    peer.put(wrong, abi.Synchronize(10, Q), abi.WriteEmb(11, Q, (VEC, 0, 2), 0))
    assert [outcome(controller, peer, i) for i in (9, 10)] == [expected] * 2
    peer.put(abi.ReadEmb(12, Q, (VEC, 0, 2), 0))
    assert controller.wait(peer, 12) == 2
    assert ring_out(controller, 0, 2) == V1 + V2


def test_a_model_that_takes_no_vectors_says_so() -> None:
    controller = ControllerProcess(traits=["Forward", "OutputEmbed"])
    peer = admit(controller, [1, 2])
    peer.put(abi.WriteEmb(1, Q, (VEC, 0, 1), 0), abi.Synchronize(None, Q))
    peer.put(abi.Forward(2, Q, (OUT, 0, 1), []), abi.Synchronize(None, Q))
    assert [outcome(controller, peer, i) for i in (1, 2)] == [errors.TraitError] * 2
    peer.put(abi.ReadEmb(3, Q, (OUT, 0, 1), 0))
    assert controller.wait(peer, 3) == 1
    controller.close()


def test_vectors_take_no_more_rows_than_there_are(controller: ControllerProcess) -> None:
    peer = admit(controller, [1, 2])
    peer.put(abi.AllocEmb(None, Q, 9, 300), abi.WriteEmb(1, Q, (9, 0, 257), 0))
    assert outcome(controller, peer, 1) is errors.OutOfMemoryError
    peer.put(abi.Synchronize(None, Q), abi.DeallocEmb(None, Q, OUT))
    controller.device.rings_in[1][:8192] = bytes(8192)
    peer.put(abi.WriteEmb(2, Q, (9, 0, 256), 0), abi.DeallocEmb(3, Q, 9))
    assert [outcome(controller, peer, i) for i in (2, 3)] == [None, None]


def test_vectors_count_against_the_share_of_a_step(controller: ControllerProcess) -> None:
    peer = admit(controller, [1, 2])
    peer.put(abi.AllocEmb(None, Q, 9, 200), abi.EmbedTxt(None, Q, (9, 0), [7] * 200))
    peer.put(*[abi.ReadEmb(None, Q, (9, 0, 200), 0)] * 12, abi.Synchronize(1, Q))
    assert controller.wait(peer, 1) is None
    counts = [len(ints(step.embed_from)) for step in controller.device.steps]
    assert sum(counts) == 2400 and max(counts) <= 1024
