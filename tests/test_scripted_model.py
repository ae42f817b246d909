"""The scripted model: it says what it is told, sees exactly the slots it should, and samples as
the model on torch does."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from piehost.gpu_backend import scripted_sampling
from piehost.gpu_backend.sampling import SamplingParams, distributions, log_probabilities, sample
from piehost.gpu_backend.scripted import ScriptedBackend
from piehost.gpu_backend.shaping import Shaping
from piehost.gpu_backend.vocabulary import load_vocabulary
from piehost.host.shm import create_ring, create_ring_in
from piehost.wire.step import LATE_STEPS, MAX_SAMPLES, LoadFailed, Ready, Step

from .backend_process import BackendProcess
from .host_harness import Terminal, write_program
from .naive_sampling import naive, params, rows
from .step_driver import StepDriver, i32
from .toy_device import ToyDevice

FOLDER = Path(__file__).resolve().parent.parent / "gpu_backend" / "default_model"
TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
VOCAB = 2048
EOS = 0
PAGE = 8


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text).ids
    return ids


def backend_of(tmp_path: Path, script: str) -> ScriptedBackend:
    path = tmp_path / "script.toml"
    path.write_text(script)
    return ScriptedBackend(f"scripted:{path}", page_size=PAGE, kv_pages=64)


@pytest.fixture
def unscripted(tmp_path: Path) -> ScriptedBackend:
    """The checksum alone decides."""
    return backend_of(tmp_path, "")


def said(backend: ScriptedBackend, prompt: list[int], most: int = 40) -> list[int]:
    """What the model says greedily, up to an end token (left out) or `most` tokens."""
    driver = StepDriver(backend.run, backend.info.page_size)
    sequence = driver.add(prompt, most)
    while len(sequence.output) < most:
        driver.step([sequence])
        if sequence.output[-1] in backend.info.eos_tokens:
            return sequence.output[:-1]
    return sequence.output


# --- scripts ----------------------------------------------------------------------------------

TWO = """
[[say]]
after = "Q: name?\\nA:"
text = " My name is Pie."

[[say]]
after = "A:"
text = " Yes."
"""


@pytest.mark.parametrize(
    ("script", "prompt", "text"),
    [
        (TWO, "Q: name?\nA:", " My name is Pie."),  # the longer `after`
        (TWO, "Q: late?\nA:", " Yes."),
        (TWO, "Q: late?\nA: Yes.\nQ: name?\nA:", " My name is Pie."),
        (TWO, "Q: name?\nA: My name", " is Pie."),  # it goes on with what was begun
        (TWO, "Q: name?\nA: My name is Pie.", ""),  # and says it once
        (TWO + '[[say]]\nafter = "A:"\ntext = " No."', "Q: late?\nA:", " No."),  # the later one
        (TWO + '[otherwise]\ntext = " What?"', "Hello", " What?"),
        (TWO + '[otherwise]\ntext = " What?"', "Hello What", "?"),
        (TWO + '[otherwise]\ntext = " What?"', "Q: late?\nA:", " Yes."),
        ('[[say]]\nafter = "one"\ntext = " one two one two"', "one", " one two one two"),
        ('[[say]]\nafter = "user\\nHi\\nassistant\\n"\ntext = "Hello!"', "CHAT", "Hello!"),
        (
            '[[say]]\nafter = "<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n"\n'
            'text = "Hello!<|im_end|>"',
            "CHAT",
            "Hello!",
        ),
        ('[[say]]\nafter = "snow"\ntext = " \\u2603\\U0001F600"', "snow", " \u2603\U0001f600"),
        ('[[say]]\nafter = "Hush"\ntext = ""', "Hush", ""),
    ],
)
def test_it_says_what_the_script_says(tmp_path: Path, script: str, prompt: str, text: str) -> None:
    chat = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    tokens = said(backend_of(tmp_path, script), encode(chat if prompt == "CHAT" else prompt))
    assert TOKENIZER.decode(tokens) == text


def test_an_end_token_in_the_text_is_the_end(tmp_path: Path) -> None:
    backend = backend_of(tmp_path, '[[say]]\nafter = "Hi"\ntext = " you<|im_end|>"')
    driver = StepDriver(backend.run, PAGE)
    sequence = driver.add(encode("Hi"), 8)
    driver.generate([sequence], len(encode(" you")) + 2)
    assert sequence.output == encode(" you<|im_end|><|im_end|>")


def test_without_a_rule_it_says_something_without_end(unscripted: ScriptedBackend) -> None:
    first, second = (said(unscripted, encode(text), 30) for text in ("Hello", "Hallo"))
    assert len(first) == len(second) == 30  # no end token came
    assert first != second


def test_the_built_in_script_says_what_the_embedded_model_would() -> None:
    backend = ScriptedBackend("scripted")
    assert TOKENIZER.decode(said(backend, encode("The capital of France is"))) == " Paris."
    assert "scripted model" in TOKENIZER.decode(said(backend, encode("Hello")))


# --- the step protocol ------------------------------------------------------------------------


class Rings:
    """A pair of rings of `backend`, and what one can see through them."""

    def __init__(self, backend: ScriptedBackend, number: int = 1) -> None:
        self.backend, self.number = backend, number
        self.out, self.into = create_ring("out", 1 << 20), create_ring_in("in", 1 << 16)
        backend.add_ring(number, self.out, 1 << 20, self.into, 1 << 16)

    def distribution(self, offset: int, k: int) -> tuple[list[int], list[float]]:
        data = os.pread(self.out, 8 * k, offset)
        return (
            np.frombuffer(data[: 4 * k], "<u4").tolist(),
            np.frombuffer(data[4 * k :], "<f4").tolist(),
        )

    def read(self, number: int, row: int, k: int = 50) -> tuple[list[int], list[float]]:
        """The distribution after hidden state `row`, by step `number`."""
        done = self.backend.run(Step(number, dists=[(row, k, self.number, 0)]))
        assert (done.error, done.dists) == (None, [k])
        return self.distribution(0, k)

    def close(self) -> None:
        os.close(self.out)
        os.close(self.into)


@pytest.fixture
def rings(unscripted: ScriptedBackend) -> Iterator[Rings]:
    made = Rings(unscripted)
    yield made
    made.close()


def samples(rows: list[int], **more: Any) -> dict[str, Any]:
    """The fields of greedy samples from these rows, changed by `more`."""
    count = len(rows)
    return {
        "sample_rows": i32(rows),
        "temperature": np.zeros(count, np.float32).tobytes(),
        "top_k": i32([0] * count),
        "top_p": np.ones(count, np.float32).tobytes(),
        "min_p": np.zeros(count, np.float32).tobytes(),
        "uniform": np.zeros(count, np.float64).tobytes(),
    } | more


def prefill(step: int, tokens: list[int], page: int = 0, row: int = 3, **more: Any) -> Step:
    """`tokens` at positions 0, 1, ... of one page; the last one's hidden state goes to `row`."""
    count = len(tokens)
    return Step(
        step,
        clear_pages=i32([page]),
        tokens=i32(tokens),
        positions=i32(range(count)),
        write_slots=i32(range(page * PAGE, page * PAGE + count)),
        paged_inputs=i32([count]),
        paged_kv=i32([count]),
        paged_pages=i32([page]),
        keep_inputs=i32([count - 1]),
        keep_rows=i32([row]),
        **more,
    )


def random_step(number: int, seed: int, toy: ToyDevice) -> Step:
    """A step of everything: two paged segments behind what is there, listed ones with and without
    masks, copies, hidden and shown and cleared slots. Valid as the controller's steps are."""
    rng = random.Random(seed)
    pages = rng.sample(range(8), 8)
    step: dict[str, Any] = {"clear_pages": i32(pages[:2])}
    written = [slot for slot in toy.slots if slot // PAGE not in pages[:2]]
    loose = [slot for slot in written if slot // PAGE in pages[4:]]
    cleared = rng.sample(loose, min(2, len(loose)))
    step["clear_slots"] = i32(cleared)
    loose = [slot for slot in loose if slot not in cleared]
    targets = [pages[4] * PAGE + i for i in rng.sample(range(PAGE), 3)]
    sources = [rng.choice(loose) if loose else targets[0] for _ in targets]
    step |= {"copy_source": i32(sources), "copy_target": i32(targets)}
    step["hide"] = i32(rng.sample(loose, min(3, len(loose))))
    step["show"] = i32(rng.sample(loose, min(2, len(loose))))
    tokens: list[int] = []
    positions: list[int] = []
    writes: list[int] = []
    paged, listed, listed_slots, masks = [], [], [], []
    for page in pages[:2]:  # empty pages, so that the run is regular
        count, base = rng.randint(1, PAGE), rng.randint(0, 50)
        tokens += [rng.randrange(VOCAB) for _ in range(count)]
        positions += range(base, base + count)
        writes += range(page * PAGE, page * PAGE + count)
        paged.append((count, page))
    for page in pages[2:4]:
        count = rng.randint(1, 4)
        own = [page * PAGE + i for i in rng.sample(range(PAGE), count)]
        others = [slot for slot in written if slot // PAGE in pages[4:] and slot not in targets]
        reads = rng.sample(others, min(rng.randint(0, 12), len(others)))
        tokens += [rng.randrange(VOCAB) for _ in range(count)]
        positions += rng.sample(range(60), count)
        writes += own
        listed.append((count, len(reads) + count))
        listed_slots += reads + own
        width = (len(reads) + count + 7) // 8
        masks.append(rng.choice([None, rng.randbytes(width * count)]))
    keep = rng.sample(range(len(tokens)), rng.randint(1, len(tokens)))
    return Step(
        number,
        **step,
        tokens=i32(tokens),
        positions=i32(positions),
        write_slots=i32(writes),
        paged_inputs=i32([count for count, _ in paged]),
        paged_kv=i32([count for count, _ in paged]),
        paged_pages=i32([page for _, page in paged]),
        listed_inputs=i32([count for count, _ in listed]),
        listed_kv=i32([kv for _, kv in listed]),
        listed_slots=i32(listed_slots),
        listed_masks=masks,
        keep_inputs=i32(keep),
        keep_rows=i32(range(len(keep))),
    )


def look(attended: list[tuple[int, int]], number: int = 0) -> Step:
    """A step whose row 0 is the hidden state that attends to just these (position, token)s."""
    count = len(attended)
    return Step(
        number,
        tokens=i32([token for _, token in attended]),
        positions=i32([position for position, _ in attended]),
        write_slots=i32(range(count)),
        listed_inputs=i32([count]),
        listed_kv=i32([count]),
        listed_slots=i32(range(count)),
        listed_masks=[b"\xff" * ((count + 7) // 8 * count)],
        keep_inputs=i32([0]),
        keep_rows=i32([0]),
    )


def test_hidden_states_are_what_the_toy_device_attends_to(
    unscripted: ScriptedBackend, rings: Rings, tmp_path: Path
) -> None:
    toy = ToyDevice(PAGE, VOCAB)
    plain = Rings(backend_of(tmp_path, ""))  # attends to the same, in the simplest way
    sizes = set()
    for number in range(80):
        step = random_step(number, number, toy)
        toy.run(step)
        assert unscripted.run(step).error is None
        for row in range(len(step.keep_rows) // 4):
            held = toy.rows[row]
            assert not isinstance(held, bytes)
            attended = sorted((position, item) for position, item in held if type(item) is int)
            if attended:
                assert plain.backend.run(look(attended)).error is None
                assert rings.read(number, row, 5) == plain.read(number, 0, 5), (number, row)
                sizes.add(len(attended))
    assert len(sizes) > 10
    plain.close()


def test_the_order_of_slots_does_not_matter_and_any_position_does(
    unscripted: ScriptedBackend, rings: Rings
) -> None:
    def state(positions: list[int], tokens: list[int]) -> tuple[list[int], list[float]]:
        assert unscripted.run(look(list(zip(positions, tokens, strict=True)))).error is None
        return rings.read(1, 0)

    first = state([0, 1, 2], [7, 8, 9])
    assert state([2, 0, 1], [9, 7, 8]) == first
    assert state([0, 1, 3], [7, 8, 9]) != first
    assert state([0, 1, 2], [7, 8, 10]) != first


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


# --- sampling, compared with the model on torch -------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(case=rows())
def test_draws_are_those_of_the_sampler_on_torch(
    case: tuple[Any, SamplingParams],
) -> None:
    logits, p = case
    expected = sample(torch.from_numpy(logits), p).tolist()
    for i, token in enumerate(expected):
        own = logits[i].astype(np.float64)
        heat, top_k = float(p.temperature[i]), int(p.top_k[i])
        top_p, min_p = float(p.top_p[i]), float(p.min_p[i])
        if heat > 0:  # single precision may fall on the other side of an edge this near
            ends = np.cumsum(naive(own, heat, top_k, top_p, min_p)[1])
            assume(np.abs(ends[:-1] - p.uniform[i]).min(initial=1) > 1e-5)
            before = naive(own, heat, top_k, 1.0, min_p)[1]
            assume(top_p == 1 or np.abs(np.cumsum(before) - top_p).min() > 1e-5)
        drawn = scripted_sampling.draw(logits[i], heat, top_k, top_p, min_p, float(p.uniform[i]))
        assert drawn == token


@pytest.mark.parametrize("place", range(8))
def test_a_draw_on_an_edge_is_the_next_token(place: int) -> None:
    p = params(1, uniform=place / 8)
    assert sample(torch.zeros(1, 8), p).tolist() == [place]
    assert scripted_sampling.draw(np.zeros(8, np.float32), 1.0, 0, 1.0, 0.0, place / 8) == place


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), k=st.integers(1, 400))
def test_distributions_and_shaping_are_those_of_torch(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(size=300) * 3, 1).astype(np.float32)
    ids, chances = distributions(torch.from_numpy(logits)[None], min(k, 300))
    data = scripted_sampling.distribution(logits, k)
    assert np.frombuffer(data[: len(data) // 2], "<u4").tolist() == ids[0].tolist()
    assert np.frombuffer(data[len(data) // 2 :], "<f4") == pytest.approx(
        chances[0].numpy(), rel=1e-4
    )
    token = int(rng.integers(300))
    wanted = log_probabilities(
        torch.from_numpy(logits)[None], torch.tensor([token], dtype=torch.int32)
    )
    assert scripted_sampling.log_softmax(logits)[token] == pytest.approx(wanted.item(), rel=1e-5)

    history = rng.integers(0, 20, int(rng.integers(0, 30)))
    prompt = int(rng.integers(0, len(history) + 1))
    factors = (float(rng.choice([1.0, 1.3, 0.7])), *rng.normal(size=2).tolist())
    mask = np.packbits(rng.random(300) < 0.5, bitorder="little").tobytes()
    step = Step(
        0,
        penalties=[(0, *factors, prompt, len(history))],
        history=i32(history),
        masks=[(0, 1, 0)],
    )
    shaping = Shaping.of(step, 300, lambda *_: mask, torch.from_numpy)
    assert shaping is not None
    expected = shaping.apply(torch.from_numpy(logits)[None], 0)[0].numpy()
    shaped = logits.copy()
    scripted_sampling.penalize(shaped, history, prompt, *factors)
    assert scripted_sampling.allow_only(shaped, mask)
    assert shaped == pytest.approx(expected, abs=1e-5)


# --- the process --------------------------------------------------------------------------------


def test_the_process_starts_without_torch_and_says_what_it_is() -> None:
    backend = BackendProcess("scripted", "--page-size", "8", "--kv-pages", "32")
    ready, fds = backend.started()
    assert isinstance(ready, Ready)
    assert (ready.pages, ready.device, ready.engine) == (32, "cpu", "scripted")
    assert (ready.model.name, ready.model.page_size, ready.model.vocab_size) == (
        "scripted",
        8,
        VOCAB,
    )
    assert (ready.model.bos_token, ready.model.eos_tokens) == (EOS, [0, 2])
    maps = Path(f"/proc/{backend.process.pid}/maps").read_text()
    assert "tokenizers" in maps and "torch" not in maps
    table, tokenizer = (os.pread(fd, os.fstat(fd).st_size, 0) for fd in fds)
    embedded = load_vocabulary(FOLDER, VOCAB)
    assert (table, json.loads(tokenizer)) == (embedded.table, json.loads(embedded.tokenizer_json))
    assert ready.model.chat_template == embedded.chat_template
    driver = StepDriver(lambda step: backend.run(step)[0], 8)
    sequence = driver.add(encode("The capital of France is"), 3)
    driver.generate([sequence], 3)
    assert TOKENIZER.decode(sequence.output) == " Paris."
    backend.close()
    assert backend.process.returncode == 0


def test_served_to_clients_that_name_the_same_script(terminal: Terminal, tmp_path: Path) -> None:
    script = tmp_path / "script.toml"
    script.write_text('[[say]]\nafter = "Who?"\ntext = " Me."\n')
    program = write_program(
        tmp_path,
        "ask.py",
        """
        from inferlet import Model, inferlet

        @inferlet
        def ask(model: Model, prompt: str):
            with model.context(prompt) as context:
                yield from context.generate(8)
        """,
    )
    with terminal.server("--model", f"scripted:{script}") as server:
        here = ("launch", "--socket", server.socket, program, "--model")
        relative = os.path.relpath(script)
        done = terminal.run(*here, f"scripted:{relative}", "--", "--prompt", "Who?", check=0)
        assert done.stdout == b" Me.\n"
        done = terminal.run(*here, "scripted", "--", "--prompt", "Who?", check=125)
        assert b"was started otherwise" in done.stderr


def test_programs_compute_on_its_vectors(terminal: Terminal, tmp_path: Path) -> None:
    program = write_program(
        tmp_path,
        "vectors.py",
        """
        from inferlet import Model, inferlet

        @inferlet
        def main(model: Model):
            queue, prompt = model.queue(), model.tokenize("The capital of France is").result()
            hidden = queue.forward(queue.embed_txt(prompt))
            plain = queue.sample(hidden).result()
            back = queue.write_emb(queue.read_emb(hidden).result(), [len(prompt) - 1])
            yield model.detokenize([plain, queue.sample(back).result()])
            embeddings = queue.read_emb(queue.embed_txt(prompt)).result()
            again = queue.forward(queue.write_emb(embeddings))
            yield model.detokenize([queue.sample(again).result()])
        """,
    )
    done = terminal.run("launch", "--model", "scripted", program, check=0)
    assert done.stdout == b" Paris Paris Paris\n"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("[[say]\n", "]"),
        ("[[say]]\nafter = 'a'", "text"),
        ("[[say]]\nafter = 'a'\ntext = 'b'\nbefore = 'c'", "before"),
        ("[[say]]\nafter = 1\ntext = 'b'", "after"),
        ("[[say]]\nafter = ''\ntext = 'b'", "otherwise"),
        ("[[say]]\nafter = '<|im_end|>'\ntext = 'b'", "control tokens"),
        ("[[otherwise]]\ntext = 'b'", "otherwise"),
        (b"\xff\xfe", "UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_wrong_script_is_refused_with_the_reason(
    tmp_path: Path, script: str | bytes | None, says: str
) -> None:
    path = tmp_path / "script.toml"
    if script is not None:
        path.write_bytes(script.encode() if isinstance(script, str) else script)
    backend = BackendProcess(f"scripted:{path}")
    failed, _ = backend.started()
    assert isinstance(failed, LoadFailed)
    assert says in failed.message + failed.hint
    assert failed.hint
    assert backend.process.wait(30) == 1
    assert b"Traceback" not in backend.process.communicate()[1]
    backend.close()


@pytest.mark.parametrize(
    ("model", "options"), [("scripted:", ()), ("scripted", ("--device", "cuda"))]
)
def test_what_a_scripted_model_cannot_be(model: str, options: tuple[str, ...]) -> None:
    backend = BackendProcess(model, *options)
    failed, _ = backend.started()
    assert isinstance(failed, LoadFailed) and failed.hint
    backend.close()
