"""A scripted model takes all that a step can ask for: late tokens, masks, biases, penalties,
distributions; the same steps give the same answers, and a step that fails counts for nothing."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from piehost.gpu_backend.scripted import ScriptedBackend
from piehost.wire.step import LATE_STEPS, MAX_SAMPLES, Step

from .scripted_backend import PAGE, TWO, VOCAB, Rings, backend_of, encode, prefill, said, samples
from .scripted_backend import rings as rings
from .scripted_backend import unscripted as unscripted
from .step_driver import i32


def test_late_tokens_are_those_of_the_steps_before(unscripted: ScriptedBackend) -> None:
    """A chain of steps queued without looking gives what plain decoding gives."""
    prompt = encode("The capital")
    expected = said(unscripted, prompt, 5)
    step = prefill(6, prompt, row=3, **samples([3]))
    answers = [unscripted.run(step)]
    for number, place in zip(range(7, 11), itertools.count(len(prompt)), strict=False):
        answers.append(
            unscripted.run(
                Step(
                    number,
                    tokens=i32([~((number - 1) % LATE_STEPS * MAX_SAMPLES)]),
                    positions=i32([place]),
                    write_slots=i32([place]),
                    paged_inputs=i32([1]),
                    paged_kv=i32([place + 1]),
                    paged_pages=i32(range(place // PAGE + 1)),
                    keep_inputs=i32([0]),
                    keep_rows=i32([3]),
                    **samples([3]),
                )
            )
        )
    assert [token for done in answers for token in np.frombuffer(done.tokens, "<i4")] == expected


def test_the_scripted_token_has_nine_tenths(tmp_path: Path) -> None:
    backend = backend_of(tmp_path, '[[say]]\nafter = "Hello"\ntext = " World"')
    rings = Rings(backend)
    assert backend.run(prefill(0, encode("Hello"))).error is None
    ids, chances = rings.read(1, 3, VOCAB)
    assert ids[0] == encode(" World")[0]
    assert chances[0] == pytest.approx(0.9)
    assert sum(chances) == pytest.approx(1)
    assert sorted(ids) == list(range(VOCAB))
    assert chances == sorted(chances, reverse=True)
    assert min(chances) > 0
    rings.close()


def test_samples_do_all_that_a_step_can_ask_of_them(
    unscripted: ScriptedBackend, rings: Rings
) -> None:
    """Masks, biases, penalties, log-probabilities and distributions, each on its own sample."""
    assert unscripted.run(prefill(0, encode("Hello"))).error is None
    ids, chances = rings.read(1, 3, VOCAB)
    allowed = np.zeros(VOCAB, np.uint8)
    allowed[[77, ids[9], ids[10]]] = 1
    os.pwrite(rings.into, np.packbits(allowed, bitorder="little").tobytes(), 33)
    os.pwrite(rings.into, bytes(VOCAB // 8), 1024)
    late = 2 % LATE_STEPS * MAX_SAMPLES  # sample 0 of step 2: ids[0]
    unscripted.run(Step(2, **samples([3])))
    done = unscripted.run(
        Step(
            3,
            dists=[(3, 3, 1, 512), (3, 3, 9, 0), (3, 3, 1, (1 << 20) - 20)],
            masks=[(1, 1, 33), (2, 1, 1024), (3, 9, 0)],
            bias_samples=i32([4, 4, 5]),
            bias_tokens=i32([ids[5], ids[6], ids[7]]),
            bias_values=np.array([20, 19.9, 30], np.float32).tobytes(),
            # histories: for 6 the two best; for 7 the second as prompt, which counts for
            # repetition alone; for 8 the best twice, once as a late token
            penalties=[
                (6, 50.0, 0.0, 0.0, 1, 2),
                (7, 1.0, 50.0, 0.0, 1, 2),
                (8, 1.0, 0.0, 10.0, 0, 3),
            ],
            history=i32([ids[0], ids[1], ids[1], ids[0], ids[0], ids[1], ~late]),
            logprobs=i32([1, 5]),
            **samples([3] * 9),
        )
    )
    assert done.error is None
    tokens = np.frombuffer(done.tokens, "<i4").tolist()
    assert tokens[0] == ids[0]
    assert tokens[1] == ids[9]  # the most probable of those allowed
    assert tokens[2:4] == [-1, -1]  # a mask without a token, a ring that is not there
    assert tokens[4:6] == [ids[5], ids[7]]
    assert tokens[6:9] == [ids[2], ids[1], ids[2]]
    own = [np.log(chances[9]), np.log(chances[7])]  # before masks and biases
    assert np.frombuffer(done.logprobs, "<f4").tolist() == pytest.approx(own, rel=1e-5)
    assert done.dists == [3, -1, -1]
    assert rings.distribution(512, 3) == (ids[:3], chances[:3])
    unscripted.drop_ring(1)
    done = unscripted.run(Step(4, dists=[(3, 3, 1, 0)], masks=[(0, 1, 33)], **samples([3])))
    assert (done.dists, done.tokens) == ([-1], i32([-1]))


def test_the_same_steps_give_the_same_answers(tmp_path: Path) -> None:
    def answers() -> list[bytes]:
        backend = backend_of(tmp_path, TWO)
        rng = np.random.default_rng(5)
        done = []
        for number in range(20):
            hot = samples(
                [3] * 4,
                temperature=np.full(4, 2, np.float32).tobytes(),
                uniform=rng.random(4).tobytes(),
            )
            done.append(backend.run(prefill(number, [number, 5, 6], **hot)).tokens)
        return done

    assert answers() == answers()


def test_a_failing_step_is_reported_and_nothing_of_it_counts(
    unscripted: ScriptedBackend, rings: Rings
) -> None:
    everything = 2 * PAGE
    all_slots = Step(
        0,
        tokens=i32([9]),
        positions=i32([40]),
        write_slots=i32([everything]),
        listed_inputs=i32([1]),
        listed_kv=i32([everything + 1]),
        listed_slots=i32(range(everything + 1)),
        listed_masks=[None],
        keep_inputs=i32([0]),
        keep_rows=i32([0]),
    )

    def seen() -> tuple[list[int], list[float]]:
        assert unscripted.run(all_slots).error is None
        return rings.read(1, 0)

    assert unscripted.run(prefill(0, [5, 6, 7])).error is None
    before = seen()
    bad = prefill(1, [5, 6, 7], page=1, **samples([3]))
    bad.keep_rows = i32([1, 2])
    failed = unscripted.run(bad)
    assert failed.error is not None and failed.tokens == b""
    assert seen() == before
    bad.keep_rows = i32([1])
    assert unscripted.run(bad).error is None
    assert seen() != before
