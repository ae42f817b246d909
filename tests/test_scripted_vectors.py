"""Vectors of a scripted model go out through the ring and come back as what they were."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from piehost.gpu_backend.scripted import ScriptedBackend
from piehost.wire.step import Step

from .scripted_backend import Rings, prefill
from .scripted_backend import rings as rings
from .scripted_backend import unscripted as unscripted
from .step_driver import i32


def put(rings: Rings, number: int, row: int, vectors: Any) -> list[int]:
    """Which vectors step `number`, which fills rows from `row` on, refuses."""
    array = np.asarray(vectors, np.float32)
    os.pwrite(rings.into, array.tobytes(), 64)
    into = i32(range(row, row + len(array)))
    done = rings.backend.run(Step(number, vectors=[(1, 64, len(array))], vector_into=into))
    assert done.error is None
    return done.refused


def fetch(rings: Rings, number: int, source: list[int]) -> Any:
    """The vectors that ring out receives: of rows, or of tokens (~id)."""
    count, width = len(source), rings.backend.info.hidden_size
    step = Step(number, embeds=[(1, 128, count)], embed_from=i32(source))
    assert rings.backend.run(step).embeds == [count]
    data = os.pread(rings.out, 4 * count * width, 128)
    return np.frombuffer(data, np.float32).reshape(count, width)


def test_a_hidden_state_is_the_same_after_it_went_out_and_in(
    unscripted: ScriptedBackend, rings: Rings
) -> None:
    assert {"InputEmbed", "OutputEmbed"} <= set(unscripted.info.traits)
    assert unscripted.run(prefill(0, [5, 6, 7])).error is None
    before = rings.read(1, 3)
    vectors = fetch(rings, 2, [3])
    assert put(rings, 3, 11, vectors) == []
    assert rings.read(4, 11) == before
    assert fetch(rings, 5, [11]).tobytes() == vectors.tobytes()
    assert put(rings, 6, 11, vectors * 2) == []
    assert rings.read(7, 11) != before


def test_an_embedding_is_its_token_and_other_vectors_are_none(
    unscripted: ScriptedBackend, rings: Rings
) -> None:
    def after(number: int, **more: Any) -> tuple[list[int], list[float]]:
        assert unscripted.run(prefill(number, [5, 0], **more)).error is None
        return rings.read(number + 1, 3)

    embeddings = fetch(rings, 0, [~0, ~9, ~2047])
    assert put(rings, 1, 20, embeddings) == []
    plain = after(2)
    assert after(4, vector_inputs=i32([1]), vector_rows=i32([20])) == plain
    nine = after(6, vector_inputs=i32([1]), vector_rows=i32([21]))
    assert nine != plain
    assert put(rings, 8, 22, embeddings[:1] / 2) == []
    made_up = after(9, vector_inputs=i32([1]), vector_rows=i32([22]))
    assert made_up not in (plain, nine)
    assert after(11, vector_inputs=i32([1]), vector_rows=i32([22])) == made_up


def test_vectors_that_are_not_finite_or_have_no_ring_are_refused(rings: Rings) -> None:
    width = rings.backend.info.hidden_size
    vectors = np.ones((2, width), np.float32)
    vectors[1, 3] = np.nan
    assert put(rings, 0, 30, vectors) == [0]
    assert not fetch(rings, 1, [30, 31]).any()
    gone = Step(
        2, vectors=[(9, 0, 1)], vector_into=i32([2]), embeds=[(9, 0, 1)], embed_from=i32([2])
    )
    done = rings.backend.run(gone)
    assert (done.error, done.refused, done.embeds) == (None, [0], [-1])
