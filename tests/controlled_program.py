"""A program for every kind of control over a forward pass, and what it answered."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from piehost.host.client import Client, Run
from piehost.wire import client as wire

Floats = npt.NDArray[np.float32]

NEW_TOKENS = 20

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


def check_clear(scores: npt.NDArray[np.float64], scale: float) -> None:
    """The best token is so by far, or equality would be luck. `scale`: of the model's logits."""
    second, first = np.sort(scores)[-2:]
    assert first - second > 1e-3 * scale
