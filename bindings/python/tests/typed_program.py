"""User code of every kind, for the type checkers: each call has the type that it should have."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal, assert_type

import numpy as np
from inferlet import (
    Child,
    Distribution,
    Embeds,
    Export,
    History,
    Imported,
    KvSpan,
    Message,
    Model,
    Queue,
    Token,
    broadcast,
    deadline,
    gather,
    get_arg,
    http_get,
    http_post,
    inferlet,
    list_exported,
    quota,
    receive,
    spawn,
    store_delete,
    store_get,
    store_list,
    store_set,
    subscribe,
    time_left,
    unexport_kvpage,
)
from numpy.typing import NDArray


@inferlet
def plain(model: Model, prompt: str, mode: Literal["a", "b"] = "a") -> Iterator[str]:
    with model.context(prompt) as context:
        yield from context.generate(8, temperature=0.5, bias={1: 2.0}, repetition_penalty=1.1)
    assert_type(store_get("k").result(), bytes | None)
    assert_type(store_set("k", mode).result(), None)
    assert_type(store_delete("k").result(), bool)
    assert_type(store_list().result(), list[str])
    assert_type(list(store_list("p")), list[str])
    assert_type(quota().result(), dict[str, float])
    assert_type(receive().result(), bytes)
    assert_type(broadcast("t", "x").result(), int)
    assert_type((get_arg(0), deadline(), time_left()), tuple[str, float | None, float | None])
    assert_type(list(subscribe("t")), list[Message])
    assert_type(gather(store_get("a"), store_get("b")).result(), list[bytes | None])
    assert_type(list_exported("p").result(), list[Export])
    assert_type(unexport_kvpage("n").result(), None)
    with http_get("https://example.org", headers={"a": "b"}) as response:
        assert_type((response.status, response.headers), tuple[int, dict[str, str]])
        assert_type(b"".join(response), bytes)
    assert_type(http_post("u", (part for part in [b"a"])).read().result(), bytes)
    with spawn("worker", ["--n", "1"]) as child:
        assert_type(child, Child)
        assert_type(child.id.result(), str)
        assert_type(child.wait().result(), int)
        assert_type(list(child), list[bytes])


@inferlet
async def asynchronous(model: Model, q: Queue, tags: list[str]) -> AsyncIterator[str]:
    tokens = await model.chat([{"role": "user", "content": tag} for tag in tags])
    assert_type(tokens, list[int])
    kv = q.alloc_kv(len(tokens) + 1)
    assert_type(kv[:2], KvSpan)
    out = q.forward(q.embed_txt(tokens), write=kv[: len(tokens)])
    assert_type(out[-1], Embeds)
    history = q.alloc_history(tokens)
    assert_type(history, History)
    mask: NDArray[np.bool_] = np.ones(model.vocab_size, np.bool_)
    token = q.sample(
        out, mask=mask, history=history, presence_penalty=0.5, logprobs=True, k=4, seed=1
    )
    assert_type(token, Token)
    assert_type(await token, int | None)
    assert_type((token.logprob, token.distribution), tuple[float | None, Distribution | None])
    history.extend([token, 5])
    vectors = await q.read_emb(out)
    assert_type(vectors, NDArray[np.float32])
    q.forward(q.write_emb(vectors, [3], into=q.alloc_emb()), read=kv, mask=mask[None])
    await q.export_kvpage("n", [kv], meta=b"m", lease=60)
    imported = await q.import_kvpage("n")
    assert_type(imported, Imported)
    assert_type((imported.kv, imported.meta), tuple[KvSpan, bytes])
    with subscribe("t", job=True) as messages:
        async for message in messages:
            assert_type(message.text, str)
            yield message.sender
    response = await http_get("https://example.org")
    assert_type(await response.json(), Any)
    async for part in response:
        assert_type(part, bytes)
    async for key in store_list():
        yield key
    async for piece in model.context("x").generate(4):
        yield piece


def wrong(q: Queue, model: Model) -> None:
    """What a checker must refuse."""
    q.sample(q.alloc_emb(), temprature=1.0)  # type: ignore[call-arg]  # pyright: ignore
    store_set("k", 5)  # type: ignore[arg-type]  # pyright: ignore
    model.chat("hi")  # type: ignore[arg-type]  # pyright: ignore
    q.export_kvpage("n", 5)  # type: ignore[arg-type]  # pyright: ignore
