"""Penalties, bias, masks, log-probabilities and vectors, as `docs/abi.md` section 8 defines them:
one small float32 model, in-process, against plain NumPy and transformers."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from piehost.gpu_backend.backend import Backend
from piehost.gpu_backend.engine import IMPLEMENTATION
from piehost.host.shm import create_ring, create_ring_in
from piehost.wire.step import LATE_STEPS, MAX_SAMPLES, Step, StepDone

from .checkpoints import VOCAB_SIZE, make_checkpoint
from .step_driver import i32

RING = 1 << 16
MASK_BYTES = (VOCAB_SIZE + 7) // 8
ROWS = 4  # hidden states of four prompts, kept in rows 0 to 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), seed=11)


@pytest.fixture(scope="module")
def backend(folder: Path) -> Backend:
    backend = Backend(str(folder), dtype="float32", kv_pages=64)
    for row in range(ROWS):
        run(backend, text([3 + row, 40 + row, 80], [0, 1, 2], row))
    return backend


class Rings:
    """Ring 1 of a backend, seen from the inferlet's side."""

    def __init__(self, backend: Backend) -> None:
        out, own = create_ring("out", RING), create_ring_in("in", RING)
        backend.add_ring(1, out, RING, own, RING)
        self.out = mmap.mmap(out, RING, prot=mmap.PROT_READ)
        self.into = mmap.mmap(own, RING)

    def put(self, offset: int, values: npt.NDArray[Any]) -> None:
        data = values.tobytes()
        self.into[offset : offset + len(data)] = data

    def get(self, offset: int, count: int, dtype: Any = np.float32) -> npt.NDArray[Any]:
        return np.frombuffer(self.out, dtype, count, offset).copy()


@pytest.fixture
def rings(backend: Backend) -> Iterator[Rings]:
    yield Rings(backend)
    backend.drop_ring(1)


def text(tokens: list[int], positions: list[int], row: int, **more: Any) -> Step:
    """A forward that nobody keeps keys and values of; its last hidden state goes to `row`."""
    scratch = 64 * 16
    slots = list(range(scratch, scratch + len(tokens)))
    return Step(
        0,
        tokens=i32(tokens),
        positions=i32(positions),
        write_slots=i32(slots),
        listed_inputs=i32([len(tokens)]),
        listed_kv=i32([len(tokens)]),
        listed_slots=i32(slots),
        listed_masks=[None],
        keep_inputs=i32([len(tokens) - 1]),
        keep_rows=i32([row]),
        **more,
    )


def samples(count: int, temperature: float = 0.0, uniform: float = 0.5) -> dict[str, Any]:
    return {
        "sample_rows": i32([i % ROWS for i in range(count)]),
        "temperature": np.full(count, temperature, np.float32).tobytes(),
        "top_k": i32([0] * count),
        "top_p": np.ones(count, np.float32).tobytes(),
        "min_p": np.zeros(count, np.float32).tobytes(),
        "uniform": np.full(count, uniform, np.float64).tobytes(),
    }


def run(backend: Backend, step: Step) -> StepDone:
    done = backend.run(step)
    assert done.error is None, done.error
    return done


def tokens_of(done: StepDone) -> list[int]:
    return np.frombuffer(done.tokens, np.int32).tolist()


def logits_of(backend: Backend, row: int) -> npt.NDArray[np.float64]:
    with torch.inference_mode():
        return backend.loaded.logits(backend.pool.rows[row : row + 1])[0].numpy().astype(np.float64)


def bits(allowed: list[int]) -> npt.NDArray[np.uint8]:
    mask = np.zeros(8 * MASK_BYTES, np.bool_)
    mask[allowed] = True
    return np.packbits(mask, bitorder="little")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_sampled_token_is_that_of_a_plain_reading_of_the_contract(
    backend: Backend, data: st.DataObject
) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    rings = Rings(backend)
    count = data.draw(st.integers(1, 6))
    step = Step(0, **samples(count))
    expected = []
    masks, bias, penalties, history = [], [], [], []
    for i in range(count):
        logits = logits_of(backend, i % ROWS)
        if data.draw(st.booleans()):
            prompt = random.integers(0, VOCAB_SIZE, random.integers(0, 30)).tolist()
            added = random.integers(0, VOCAB_SIZE, random.integers(0, 30)).tolist()
            if random.random() < 0.5:  # so that penalties decide
                added += [int(logits.argmax())] * 2
            factors = [float(random.uniform(0.5, 3)), *map(float, random.normal(0, 2, 2))]
            repetition, presence, frequency = map(float, np.float32(factors))
            for token in {*prompt, *added}:
                seen = logits[token]
                logits[token] = seen / repetition if seen > 0 else seen * repetition
            for token in set(added):
                logits[token] -= presence + frequency * added.count(token)
            penalties.append((i, *factors, len(prompt), len(prompt) + len(added)))
            history += prompt + added
        for token in random.integers(0, VOCAB_SIZE, random.integers(0, 5)).tolist():
            value = float(np.float32(random.normal(0, 5)))
            bias.append((i, token, value))
            logits[token] += value
        if data.draw(st.booleans()):
            allowed = random.integers(0, VOCAB_SIZE, random.integers(1, 20)).tolist()
            rings.put(len(masks) * MASK_BYTES, bits(allowed))
            masks.append((i, 1, len(masks) * MASK_BYTES))
            kept = np.full_like(logits, -np.inf)
            kept[allowed] = logits[allowed]
            logits = kept
        expected.append(logits)
    step.masks, step.penalties, step.history = masks, penalties, i32(history)
    step.bias_samples = i32([i for i, _, _ in bias])
    step.bias_tokens = i32([token for _, token, _ in bias])
    step.bias_values = np.float32([value for *_, value in bias]).tobytes()
    for token, logits in zip(tokens_of(run(backend, step)), expected, strict=True):
        assert logits[token] > logits.max() - 1e-4  # float32 rounding may swap near-equals
    backend.drop_ring(1)


@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 2**-53])
def test_a_draw_never_leaves_the_mask(backend: Backend, rings: Rings, uniform: float) -> None:
    rings.put(8, bits([7]))
    rings.put(8 + MASK_BYTES, bits([5, 200]))
    step = Step(0, **samples(2, temperature=50.0, uniform=uniform))
    step.masks = [(0, 1, 8), (1, 1, 8 + MASK_BYTES)]
    first, second = tokens_of(run(backend, step))
    assert first == 7
    assert second in (5, 200)


def test_a_mask_without_a_token_or_outside_the_ring_is_minus_one(
    backend: Backend, rings: Rings
) -> None:
    rings.put(0, np.zeros(MASK_BYTES, np.uint8))
    step = Step(0, **samples(4))
    step.masks = [(0, 1, 0), (1, 1, RING - 1), (2, 9, 0)]
    tokens = tokens_of(run(backend, step))
    assert tokens[:3] == [-1, -1, -1]
    assert tokens[3] == int(logits_of(backend, 3).argmax())


def test_a_history_takes_late_tokens(backend: Backend) -> None:
    run(backend, Step(5, **samples(1)))
    (best,) = tokens_of(run(backend, Step(6, **samples(1))))
    late = 5 % LATE_STEPS * MAX_SAMPLES
    step = Step(6, **samples(1), penalties=[(0, 1.0, 1e6, 0.0, 0, 1)], history=i32([~late]))
    logits = logits_of(backend, 0)
    logits[best] = -np.inf
    assert tokens_of(run(backend, step)) == [int(logits.argmax())]


def test_log_probabilities_and_distributions_are_the_models_own(
    backend: Backend, rings: Rings
) -> None:
    step = Step(0, **samples(3), logprobs=i32([0, 2]), dists=[(0, 5, 1, 64), (3, 4, 1, 0)])
    step.bias_samples, step.bias_tokens = i32([2]), i32([9])
    step.bias_values = np.float32([1e4]).tobytes()
    done = run(backend, step)
    tokens = tokens_of(done)
    assert tokens[2] == 9
    for token, row, logprob in zip(
        (tokens[0], tokens[2]), (0, 2), np.frombuffer(done.logprobs, np.float32), strict=True
    ):
        logits = logits_of(backend, row)
        expected = logits[token] - np.log(np.exp(logits).sum())
        assert logprob == pytest.approx(expected, abs=1e-4)
    assert done.dists == [5, 4]
    for row, offset, k in ((0, 64, 5), (3, 0, 4)):
        logits = logits_of(backend, row)
        best = np.argsort(-logits, kind="stable")[:k]
        assert rings.get(offset, k, np.uint32).tolist() == best.tolist()
        chances = np.exp(logits - np.log(np.exp(logits).sum()))[best]
        assert rings.get(offset + 4 * k, k) == pytest.approx(chances, abs=1e-5)


def test_vectors_go_out_and_come_back_bit_by_bit(backend: Backend, rings: Rings) -> None:
    hidden = backend.loaded.hidden_size
    done = run(backend, Step(0, embeds=[(1, 0, 2), (1, 4096, 1)], embed_from=i32([1, 3, ~17])))
    assert done.embeds == [2, 1]
    out = rings.get(0, 2 * hidden)
    assert out.tobytes() == backend.pool.rows[[1, 3]].numpy().tobytes()
    embedding = backend.loaded.model.get_input_embeddings().weight[17].detach().numpy()
    assert rings.get(4096, hidden).tobytes() == embedding.tobytes()
    rings.put(128, out)
    done = run(backend, Step(0, vectors=[(1, 128, 2)], vector_into=i32([10, 11])))
    assert done.refused == []
    assert backend.pool.rows[10:12].numpy().tobytes() == out.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_round_trip_is_exact_in_half_precision(folder: Path, dtype: str) -> None:
    backend = Backend(str(folder), dtype=dtype, kv_pages=64)
    run(backend, text([3, 40, 80], [0, 1, 2], 0))
    rings = Rings(backend)
    run(backend, Step(0, embeds=[(1, 0, 1)], embed_from=i32([0])))
    rings.put(0, rings.get(0, backend.loaded.hidden_size))
    run(backend, Step(0, vectors=[(1, 0, 1)], vector_into=i32([5])))
    assert torch.equal(backend.pool.rows[5], backend.pool.rows[0])


def test_a_tokens_embedding_as_input_is_the_token(backend: Backend, rings: Rings) -> None:
    run(backend, text([3, 17, 80], [0, 1, 2], 4))
    run(backend, Step(0, embeds=[(1, 0, 1)], embed_from=i32([~17])))
    rings.put(0, rings.get(0, backend.loaded.hidden_size))
    step = text([3, 0, 80], [0, 1, 2], 5, vectors=[(1, 0, 1)], vector_into=i32([20]))
    step.vector_inputs, step.vector_rows = i32([1]), i32([20])
    run(backend, step)
    assert torch.equal(backend.pool.rows[5], backend.pool.rows[4])
    assert not torch.equal(backend.pool.rows[5], backend.pool.rows[0])


def test_a_hidden_state_as_input_is_what_transformers_makes_of_it(backend: Backend) -> None:
    step = text([3, 0], [0, 1], 6, vector_inputs=i32([1]), vector_rows=i32([2]))
    run(backend, step)
    model = backend.loaded.model
    with torch.inference_mode():
        embeddings = model.get_input_embeddings()(torch.tensor([3]))
        inputs = torch.cat((embeddings, backend.pool.rows[2:3]))[None]
        model.set_attn_implementation("eager")
        expected = model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state[0, -1]
        model.set_attn_implementation(IMPLEMENTATION)
    torch.testing.assert_close(backend.pool.rows[6], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused_and_hurt_nobody_else(
    backend: Backend, rings: Rings, bad: float
) -> None:
    hidden = backend.loaded.hidden_size
    values = np.ones((2, hidden), np.float32)
    rings.put(0, values)
    values[1, 3] = bad
    rings.put(8192, values)
    vectors = [(1, 0, 2), (1, 8192, 2), (1, RING - 4, 1), (4, 0, 1)]
    done = run(backend, Step(0, vectors=vectors, vector_into=i32([30, 31, 32, 33, 34, 35])))
    assert done.refused == [1, 2, 3]
    assert bool((backend.pool.rows[30:32] == 1).all())
    assert bool((backend.pool.rows[32:36] == 0).all())


def test_a_model_that_looks_at_token_ids_again_is_found_out(folder: Path) -> None:
    backend = Backend(str(folder), dtype="float32", kv_pages=64)
    assert "InputEmbed" in backend.info.traits
    from piehost.gpu_backend.self_check import takes_vectors

    inner = backend.loaded.model.base_model.forward

    def peeking(input_ids: Any = None, **more: Any) -> Any:
        out = inner(input_ids=input_ids, **more)
        if input_ids is not None:
            out.last_hidden_state = out.last_hidden_state + input_ids[..., None]
        return out

    backend.loaded.model.base_model.forward = peeking
    assert not takes_vectors(backend.loaded)
