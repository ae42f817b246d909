"""Control over sampling, vectors and exports, from an inferlet through the real host, controller,
sandbox and float32 backend: the same numbers as transformers' own, alone and in one batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from piehost.host.client import Client, Run
from piehost.wire import client as wire

from .checkpoints import VOCAB_SIZE, make_checkpoint
from .host_harness import new_terminal, write_program

Floats = npt.NDArray[np.float32]

DEFAULT_MODEL = Path(__file__).resolve().parents[1] / "gpu_backend" / "default_model"
# Random checkpoints: seeds whose greedy choices are clear (checked below), also under control.
SEEDS = {"llama": 4, "qwen3": 3, "mistral": 3, "gemma3": 1}
NEW_TOKENS = 20
THOUGHTS = 5  # hidden states fed back as inputs
REPETITION = 1.7
PRESENCE, FREQUENCY = 0.5, 1.0
TOP = 5
TOLERANCE = 1e-4  # of a log-probability

# One program for all kinds: it takes a job as JSON, and answers with JSON, then with any vectors.
PROGRAM = """
    import json

    import numpy as np

    from inferlet import Model, Queue, inferlet, receive, send, unexport_kvpage


    class Sequence:
        '''Tokens in KV pages of this program's own, after pages that it only reads.'''

        def __init__(self, queue, length, before=None):
            self.queue = queue
            self.before = [] if before is None else [before]
            self.own = queue.alloc_kv(length)
            self.filled = 0

        def add(self, inputs, **options):
            end = self.filled + len(inputs)
            read, write = [*self.before, self.own[: self.filled]], self.own[self.filled : end]
            self.filled = end
            return self.queue.forward(inputs, read=read, write=write, **options)

        def go_on(self, hidden, position, count, **options):
            '''Samples `count` tokens, in one chain of late-bound ones.'''
            tokens = []
            for i in range(count):
                tokens.append(self.queue.sample(hidden, **options))
                hidden = self.add(self.queue.embed_txt(tokens[-1:], position + i))
            return tokens


    def generate(model, queue, prompt, count, penalized=False, allowed=None, bias={}, **options):
        if penalized:
            options["history"] = queue.alloc_history(prompt)
        if allowed is not None:
            options["mask"] = np.isin(np.arange(model.vocab_size), allowed)
        options["bias"] = {int(token): value for token, value in bias.items()}
        text = Sequence(queue, len(prompt) + count)
        hidden = text.add(queue.embed_txt(prompt))
        tokens = text.go_on(hidden, len(prompt), count, **options)
        reply = {"tokens": [token.result() for token in tokens]}
        if options.get("logprobs"):
            reply["logprobs"] = [token.logprob for token in tokens]
        if options.get("k"):
            reply["top"] = [token.distribution.ids.tolist() for token in tokens]
            reply["chances"] = [token.distribution.probs.tolist() for token in tokens]
        return reply, []


    def soft_prompt(model, queue, prompt, count):
        vectors = queue.read_emb(queue.embed_txt(prompt)).result()
        text = Sequence(queue, len(prompt) + count)
        hidden = text.add(queue.write_emb(vectors))
        tokens = text.go_on(hidden, len(prompt), count)
        return {"tokens": [token.result() for token in tokens]}, [vectors]


    def hidden_states(model, queue, prompt):
        text = Sequence(queue, len(prompt))
        states = text.add(queue.embed_txt(prompt), outputs=len(prompt))
        return {}, [queue.read_emb(states).result()]


    def latent_chain(model, queue, prompt, thoughts, count, by_hand):
        text = Sequence(queue, len(prompt) + thoughts + count)
        hidden = text.add(queue.embed_txt(prompt))
        seen = []
        for position in range(len(prompt), len(prompt) + thoughts):
            seen.append(queue.read_emb(hidden))
            if by_hand:  # out of the accelerator, through this program, and in again
                hidden = text.add(queue.write_emb(seen[-1].result(), position))
            else:
                hidden = text.add(hidden, positions=[position])
        tokens = text.go_on(hidden, len(prompt) + thoughts, count)
        reply = {"tokens": [token.result() for token in tokens]}
        return reply, [np.concatenate([state.result() for state in seen])]


    def export(model, queue, prompt, name, count):
        kv = queue.alloc_kv(len(prompt))
        hidden = queue.forward(queue.embed_txt(prompt), write=kv)
        shared = queue.export_kvpage(name, kv, meta=json.dumps(prompt), lease=600)
        mine = Sequence(queue, count, before=kv)
        tokens = mine.go_on(hidden, len(prompt), count)
        shared.result()
        return {"tokens": [token.result() for token in tokens]}, []


    def go_on_from_import(model, queue, name, token, count):
        imported = queue.import_kvpage(name).result()
        prompt = json.loads(imported.meta)
        text = Sequence(queue, count + 1, before=imported.kv[: len(prompt)])
        hidden = text.add(queue.embed_txt([token], len(prompt)))
        tokens = text.go_on(hidden, len(prompt) + 1, count)
        unexport_kvpage(name).result()
        return {"tokens": [token.result() for token in tokens]}, []


    @inferlet
    def controlled(model: Model, queue: Queue):
        send("ready")
        job = json.loads(receive().result())
        reply, vectors = globals()[job.pop("kind")](model, queue, **job)
        send(json.dumps(reply))
        for array in vectors:
            send(array.tobytes())
"""


@dataclass
class Reply:
    """What a job gave: `said` in JSON, then vectors, f32[n, hidden_size] each."""

    said: dict[str, Any]
    vectors: list[Floats]

    @property
    def tokens(self) -> list[int]:
        tokens: list[int] = self.said["tokens"]
        return tokens


@dataclass
class Case:
    """A server of one model, the program, and the same model in transformers."""

    client: Client
    program: Path
    model: Any
    prompt: list[int]
    other_prompt: list[int]
    _alone: dict[str, Reply] = field(default_factory=dict)
    _generated: dict[str, tuple[list[int], torch.Tensor]] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    def start(self) -> Run:
        run = self.client.launch(self.program)
        for event in run.events():
            if isinstance(event, wire.Message):
                assert event.data == b"ready"
                return run
            assert not isinstance(event, wire.Ended), event.reason
        raise AssertionError("it said nothing")

    def finish(self, run: Run) -> Reply:
        result = run.result(timeout=90)
        assert result.code == 0, (result.reason, result.stderr.decode())
        said, *vectors = result.messages
        width = self.model.config.hidden_size
        return Reply(
            json.loads(said), [np.frombuffer(v, np.float32).reshape(-1, width) for v in vectors]
        )

    def alone(self, kind: str, **job: Any) -> Reply:
        """The job's reply with nothing else on the server; carried out once."""
        text = json.dumps({"kind": kind, **job})
        if text not in self._alone:
            run = self.start()
            run.send(text.encode())
            self._alone[text] = self.finish(run)
        return self._alone[text]

    def generated(self, prompt: list[int], **options: Any) -> tuple[list[int], torch.Tensor]:
        """transformers' own greedy tokens, and the model's logits for them, f32[n, vocab_size]."""
        key = repr((prompt, options))
        if key not in self._generated:
            output = self.model.generate(
                torch.tensor([prompt]),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                output_logits=True,
                output_scores=True,
                return_dict_in_generate=True,
                **options,
            )
            logits = torch.cat(output.logits)
            for raw, scores in zip(logits, output.scores, strict=True):
                check_clear(scores[0].double().numpy(), float(raw.std()))
            self._generated[key] = output.sequences[0, len(prompt) :].tolist(), logits
        return self._generated[key]

    def together(self, jobs: list[dict[str, Any]]) -> list[Reply]:
        """The jobs' replies when all begin at once."""
        runs = [self.start() for _ in jobs]
        for run, job in zip(runs, jobs, strict=True):
            run.send(json.dumps(job).encode())
        return [self.finish(run) for run in runs]


@pytest.fixture(scope="module", params=[*SEEDS, "default"])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    name = request.param
    torch.set_num_threads(1)  # small models, and the server computes beside them
    folder = DEFAULT_MODEL
    if name != "default":
        folder = make_checkpoint(tmp_path_factory.mktemp(name), name, seed=SEEDS[name])
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.generation_config.eos_token_id = None
    random = np.random.default_rng(1)
    prompts = [random.integers(3, VOCAB_SIZE, n).tolist() for n in (21, 9)]
    program = write_program(tmp_path_factory.mktemp("program"), "controlled.py", PROGRAM)
    options = ("--model", folder, "--device", "cpu", "--dtype", "float32")
    with (
        new_terminal() as terminal,
        terminal.server(*options) as server,
        server.client() as client,
    ):
        yield Case(client, program, model, *prompts)


# --- the same in transformers ---------------------------------------------------------------------


def check_clear(scores: npt.NDArray[np.float64], scale: float) -> None:
    """The best token is so by far, or equality would be luck. `scale`: of the model's logits."""
    second, first = np.sort(scores)[-2:]
    assert first - second > 1e-3 * scale


def penalized_by_hand(case: Case, prompt: list[int]) -> list[int]:
    """Greedy with presence and frequency penalties, each step from the whole text."""
    tokens: list[int] = []
    counts = np.zeros(case.vocab_size)
    for _ in range(NEW_TOKENS):
        with torch.inference_mode():
            logits = case.model(torch.tensor([prompt + tokens])).logits[0, -1].double().numpy()
        scores = logits - PRESENCE * (counts > 0) - FREQUENCY * counts
        check_clear(scores, float(logits.std()))
        tokens.append(int(scores.argmax()))
        counts[tokens[-1]] += 1
    return tokens


def states_of(case: Case, embeddings: torch.Tensor) -> torch.Tensor:
    """Hidden states [n, hidden_size] at the end of the last layer, after the final norm."""
    with torch.inference_mode():
        output = case.model.base_model(inputs_embeds=embeddings[None], use_cache=False)
    states: torch.Tensor = output.last_hidden_state[0]
    return states


def embeddings_of(case: Case, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        embeddings: torch.Tensor = case.model.get_input_embeddings()(torch.tensor(tokens))
    return embeddings


def thought_by_hand(case: Case, prompt: list[int]) -> tuple[Floats, list[int]]:
    """The hidden states fed back, and the greedy tokens after them."""
    inputs = embeddings_of(case, prompt)
    thoughts: list[torch.Tensor] = []
    for _ in range(THOUGHTS):
        thoughts.append(states_of(case, inputs)[-1:])
        inputs = torch.cat((inputs, thoughts[-1]))
    tokens: list[int] = []
    for _ in range(NEW_TOKENS):
        with torch.inference_mode():
            logits = case.model(inputs_embeds=inputs[None], use_cache=False).logits[0, -1]
        check_clear(logits.double().numpy(), float(logits.std()))
        tokens.append(int(logits.argmax()))
        inputs = torch.cat((inputs, embeddings_of(case, tokens[-1:])))
    return torch.cat(thoughts).numpy(), tokens


# --- the jobs -------------------------------------------------------------------------------------


def plain(case: Case) -> dict[str, Any]:
    return {"kind": "generate", "prompt": case.prompt, "count": NEW_TOKENS}


def repetition_penalty(case: Case) -> dict[str, Any]:
    return {**plain(case), "penalized": True, "repetition_penalty": REPETITION}


def other_penalties(case: Case) -> dict[str, Any]:
    penalties = {"presence_penalty": PRESENCE, "frequency_penalty": FREQUENCY}
    return {**plain(case), "prompt": case.other_prompt, "penalized": True, **penalties}


def suppressed(case: Case) -> list[int]:
    """What plain generation would say first, and every fifth token."""
    tokens = case.generated(case.prompt)[0]
    return sorted({*tokens[:4], *range(0, case.vocab_size, 5)})


def masked(case: Case) -> dict[str, Any]:
    allowed = sorted({*range(case.vocab_size)}.difference(suppressed(case)))
    return {**plain(case), "allowed": allowed}


def biases(case: Case) -> dict[int, float]:
    """Up for some tokens, down for those that plain generation says."""
    tokens, logits = case.generated(case.prompt)
    scale = float(logits.std())
    return dict.fromkeys(range(3, 30), 1.5 * scale) | dict.fromkeys(tokens[1:6], -2.5 * scale)


def biased(case: Case) -> dict[str, Any]:
    return {**plain(case), "bias": {str(t): value for t, value in biases(case).items()}}


def looked_at(case: Case) -> dict[str, Any]:
    return {**plain(case), "prompt": case.other_prompt, "logprobs": True, "k": TOP}


def drawn(case: Case) -> dict[str, Any]:
    return {**plain(case), "temperature": 0.8, "top_p": 0.9, "seed": 5, "logprobs": True}


def soft(case: Case) -> dict[str, Any]:
    return {"kind": "soft_prompt", "prompt": case.prompt, "count": NEW_TOKENS}


def states(case: Case) -> dict[str, Any]:
    return {"kind": "hidden_states", "prompt": case.prompt}


def latent(case: Case, by_hand: bool = False) -> dict[str, Any]:
    job = {"kind": "latent_chain", "prompt": case.other_prompt, "by_hand": by_hand}
    return {**job, "thoughts": THOUGHTS, "count": NEW_TOKENS}


ALL: list[Callable[[Case], dict[str, Any]]] = [
    plain,
    repetition_penalty,
    other_penalties,
    masked,
    biased,
    looked_at,
    drawn,
    soft,
    states,
    latent,
]


# --- tests ----------------------------------------------------------------------------------------


def test_a_repetition_penalty_is_that_of_generate(case: Case) -> None:
    expected, _ = case.generated(case.prompt, repetition_penalty=REPETITION)
    assert expected != case.generated(case.prompt)[0], "the penalty decides something"
    assert case.alone(**repetition_penalty(case)).tokens == expected


def test_presence_and_frequency_penalties_are_those_of_a_plain_loop(case: Case) -> None:
    expected = penalized_by_hand(case, case.other_prompt)
    assert expected != case.generated(case.other_prompt)[0], "the penalties decide something"
    assert len({*expected}) < NEW_TOKENS, "some tokens count twice"
    assert case.alone(**other_penalties(case)).tokens == expected


def test_a_mask_is_suppress_tokens(case: Case) -> None:
    expected, _ = case.generated(case.prompt, suppress_tokens=suppressed(case))
    assert case.alone(**masked(case)).tokens == expected


def test_a_bias_is_the_sequence_bias_of_single_tokens(case: Case) -> None:
    bias = {(token,): value for token, value in biases(case).items()}
    expected, _ = case.generated(case.prompt, sequence_bias=bias)
    assert expected != case.generated(case.prompt)[0], "the bias decides something"
    assert case.alone(**biased(case)).tokens == expected


def test_log_probabilities_and_the_best_are_those_of_the_softmax(case: Case) -> None:
    expected, logits = case.generated(case.other_prompt)
    reply = case.alone(**looked_at(case))
    assert reply.tokens == expected
    logprobs = logits.double().log_softmax(-1)
    own = logprobs[range(NEW_TOKENS), expected].numpy()
    assert np.abs(own - reply.said["logprobs"]).max() < TOLERANCE
    for row, top, chances in zip(logprobs, reply.said["top"], reply.said["chances"], strict=True):
        best = row.topk(TOP)
        assert np.abs(best.values.numpy() - np.log(chances)).max() < TOLERANCE
        assert np.abs(row[top].numpy() - np.log(chances)).max() < TOLERANCE


def test_log_probabilities_are_the_models_own_whatever_is_drawn(case: Case) -> None:
    reply = case.alone(**drawn(case))
    with torch.inference_mode():
        logits = case.model(torch.tensor([case.prompt + reply.tokens])).logits[0]
    logprobs = logits[len(case.prompt) - 1 : -1].double().log_softmax(-1)
    own = logprobs[range(NEW_TOKENS), reply.tokens].numpy()
    assert np.abs(own - reply.said["logprobs"]).max() < TOLERANCE
    assert reply.tokens != case.generated(case.prompt)[0]


def test_a_soft_prompt_of_the_tokens_embeddings_is_the_text(case: Case) -> None:
    reply = case.alone(**soft(case))
    assert np.array_equal(reply.vectors[0], embeddings_of(case, case.prompt).numpy())
    assert reply.tokens == case.generated(case.prompt)[0]
    assert reply.tokens == case.alone(**plain(case)).tokens


def test_hidden_states_are_the_last_of_transformers(case: Case) -> None:
    (mine,) = case.alone(**states(case)).vectors
    expected = states_of(case, embeddings_of(case, case.prompt)).numpy()
    np.testing.assert_allclose(mine, expected, atol=1e-3 * expected.std())


def test_a_latent_chain_is_a_loop_over_inputs_embeds(case: Case) -> None:
    thoughts, tokens = thought_by_hand(case, case.other_prompt)
    for by_hand in (False, True):
        reply = case.alone(**latent(case, by_hand))
        np.testing.assert_allclose(reply.vectors[0], thoughts, atol=1e-3 * thoughts.std())
        assert reply.tokens == tokens


def test_another_process_goes_on_from_an_export_exactly(case: Case) -> None:
    expected, _ = case.generated(case.prompt)
    job: dict[str, Any] = {"kind": "export", "prompt": case.prompt, "name": "prefix"}
    assert case.alone(**job, count=NEW_TOKENS).tokens == expected
    job = {"kind": "go_on_from_import", "name": "prefix", "token": expected[0]}
    assert case.alone(**job, count=NEW_TOKENS - 1).tokens == expected[1:]


@pytest.mark.alone
def test_all_kinds_in_one_batch_equal_each_alone(case: Case) -> None:
    jobs = [make(case) for make in ALL]
    alone = [case.alone(**job) for job in jobs]
    before = case.client.stats().controller
    replies = case.together(jobs)
    after = case.client.stats().controller
    for job, mine, reply in zip(jobs, alone, replies, strict=True):
        assert reply.said.get("tokens") == mine.said.get("tokens"), job
        for key in {"logprobs", "chances"} & reply.said.keys():
            np.testing.assert_allclose(reply.said[key], mine.said[key], atol=TOLERANCE)
        for now, then in zip(reply.vectors, mine.vectors, strict=True):
            np.testing.assert_allclose(now, then, atol=1e-3 * then.std())
    decodes = after.decode_segments - before.decode_segments
    assert decodes > 2 * (after.decode_steps - before.decode_steps), "they did share steps"
    assert after.pages_free == after.pages_total
