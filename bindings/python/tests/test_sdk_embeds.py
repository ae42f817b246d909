"""Vectors out of embeds and into them, through the rings."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from inferlet import (
    ArgumentError,
    Embeds,
    PositionError,
    QuotaError,
    SpanError,
    UnwrittenError,
    abi,
)
from scripted import Host
from scripted_controller import Controller
from scripted_device import (
    HIDDEN_SIZE,
    RING_BYTES,
    RING_IN_BYTES,
    next_token,
)

FIRST = next_token(((0, 1), (1, 2), (2, 3)))  # after [1, 2, 3]


def hidden(q: Any) -> Embeds:
    out: Embeds = q.forward(q.embed_txt([1, 2, 3]))
    return out


def test_what_read_emb_gives_comes_back_bit_by_bit(host: Host) -> None:
    with host.model.queue() as q:
        emb = q.forward(q.embed_txt([1, 2, 3]), outputs=3)
        vectors = q.read_emb(emb).result()
        assert vectors.shape == (3, HIDDEN_SIZE) and vectors.dtype == np.float32
        states = host.controller.embs[emb.handle.number]
        assert vectors.tobytes() == b"".join(map(Controller.vector_of, states))
        with pytest.raises(ValueError, match="read-only"):
            vectors[0, 0] = 1
        back = q.write_emb(vectors, 7)
        assert q.read_emb(back).result().tobytes() == vectors.tobytes()
        entries = host.controller.embs[back.handle.number]
        assert [position for _, _, position in entries] == [7, 8, 9]


def test_vectors_are_inputs_of_forward(host: Host) -> None:
    with host.model.queue() as q:
        kv = q.alloc_kv(3)
        one = q.write_emb(np.ones((2, HIDDEN_SIZE), np.float32), write_positions := [0, 1])
        assert write_positions == [0, 1]
        token = q.sample(q.forward(one, write=kv[:2])).result()
        into = q.alloc_emb(4)
        again = q.write_emb(np.ones((2, HIDDEN_SIZE)), into=into[1:3])  # float64 is narrowed
        assert q.sample(q.forward(again)).result() == token
        other = q.write_emb(np.zeros((2, HIDDEN_SIZE), np.float32))
        assert q.sample(q.forward(other)).result() != token
        with pytest.raises(UnwrittenError):
            q.read_emb(into).result()


def test_the_places_of_vectors_are_used_again(host: Host) -> None:
    rows = RING_IN_BYTES // (4 * HIDDEN_SIZE)
    with host.model.queue() as q:
        embs = []
        for i in range(5):
            vectors = np.full((rows, HIDDEN_SIZE), i, np.float32)
            embs.append(q.write_emb(vectors))
            with pytest.raises(QuotaError, match="ring in"):
                q.write_emb(vectors[:1])
            q.synchronize().result()
        assert [q.read_emb(emb[:1]).result()[0, 0] for emb in embs] == [0, 1, 2, 3, 4]


def test_a_view_keeps_its_place_in_the_ring(host: Host) -> None:
    rows = RING_BYTES // (4 * HIDDEN_SIZE)
    with host.model.queue() as q:
        emb = q.write_emb(np.ones((4, HIDDEN_SIZE), np.float32))
        view = q.read_emb(emb).result()[1:, 2]  # a view of a view
        gc.collect()
        big = q.embed_txt([1] * rows)
        with pytest.raises(QuotaError, match="ring out"):
            q.read_emb(big)
        assert view.tolist() == [1, 1, 1]
        del view
        gc.collect()
        assert q.read_emb(big).result().shape == (rows, HIDDEN_SIZE)


def test_vectors_of_a_stopped_chain_are_none(make_host: Callable[..., Host]) -> None:
    host = make_host(rule=lambda seen: 65)
    with host.model.queue() as q:
        stopped = q.sample(hidden(q), stop=[65])
        out = q.forward(q.embed_txt([stopped], 3))
        assert q.read_emb(out).result().shape == (0, HIDDEN_SIZE)


@pytest.mark.parametrize(
    ("vectors", "positions", "error"),
    [
        (np.ones((2, HIDDEN_SIZE + 1)), 0, ArgumentError),
        (np.ones(HIDDEN_SIZE), 0, ArgumentError),
        (np.ones((0, HIDDEN_SIZE)), 0, ArgumentError),
        (np.full((1, HIDDEN_SIZE), np.nan), 0, ArgumentError),
        (np.full((1, HIDDEN_SIZE), 1e300), 0, ArgumentError),  # infinite as f32
        ("vectors", 0, ArgumentError),
        (np.ones((2, HIDDEN_SIZE)), [1], PositionError),
        (np.ones((2, HIDDEN_SIZE)), 2**31 - 1, PositionError),
        (np.ones((2, HIDDEN_SIZE)), "0", ArgumentError),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_wrong_vectors_are_refused_here(
    host: Host, vectors: Any, positions: Any, error: type[Exception]
) -> None:
    with host.model.queue() as q:
        with pytest.raises(error):
            q.write_emb(vectors, positions)
        with pytest.raises(SpanError):
            q.write_emb(np.ones((2, HIDDEN_SIZE)), into=q.alloc_emb(3))
        with pytest.raises(ArgumentError):
            q.read_emb(q.alloc_emb(3)[:0])
        q.synchronize().result()
    assert not host.controller.of(abi.WriteEmb)
