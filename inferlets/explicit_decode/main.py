"""The listing of Pie (SOSP'25, section 4.2): every call of a greedy decode loop, by hand.

`text_completion` gives the same text with one frame for many tokens; here every token is looked
at before the next step, so every token is a round trip.
"""

from __future__ import annotations

from collections.abc import Iterator

from inferlet import Model, inferlet


@inferlet
def explicit_decode(model: Model, prompt: str, max_tokens: int = 64) -> Iterator[str]:
    """Continues a prompt greedily until the model ends it."""
    tokens = model.tokenize(prompt).result()
    text = model.stream_decoder()
    with model.queue() as q:  # leaving it frees what it allocated
        kv = q.alloc_kv(len(tokens) + max_tokens)
        out = q.forward(q.embed_txt(tokens), write=kv[: len(tokens)])
        for pos in range(len(tokens), len(kv)):
            token = q.get_next_dist(out[-1]).result().argmax()
            if token in model.eos_tokens:
                break
            yield text.feed(token)
            out = q.forward(q.embed_txt([token], [pos]), read=kv[:pos], write=kv[pos : pos + 1])
    yield text.finish()
