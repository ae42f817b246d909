"""Every command of docs/abi.md, and every error that a program can meet without doing wrong.

It sends one message a step: what came of it, or the name of the error. They are the same in every
weather that `piehost conform` has, but for those with errors.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from inferlet import (
    Embeds,
    Future,
    InferletError,
    KvSpan,
    Model,
    Queue,
    broadcast,
    gather,
    http_get,
    http_post,
    inferlet,
    list_exported,
    quota,
    receive,
    send,
    spawn,
    store_delete,
    store_exists,
    store_get,
    store_list,
    store_set,
    subscribe,
    unexport_kvpage,
)

TEXT = "The capital of France is"
CHILD = "child"


def step(name: str, act: Callable[[], object]) -> None:
    try:
        outcome = act()
    except InferletError as error:
        outcome = error.name
    send(f"{name}: {outcome}\n")


def with_queue(
    name: str, model: Model, tokens: list[int], act: Callable[[Queue, list[int]], object]
) -> None:
    with model.queue() as queue:
        step(name, lambda: act(queue, tokens))
        step(f"{name}, synchronize", lambda: queue.synchronize().result())


def named(act: Callable[[], object]) -> str:
    """The error that `act` meets."""
    try:
        act()
    except InferletError as error:
        return error.name
    return "none"


# --- on a queue ---------------------------------------------------------------------------------


def prefill(queue: Queue, tokens: list[int], slots: int = 64) -> tuple[KvSpan, Embeds]:
    kv = queue.alloc_kv(slots)
    hidden = queue.forward(queue.embed_txt(tokens), write=kv[: len(tokens)])
    return kv, hidden


def chain(queue: Queue, tokens: list[int]) -> object:
    """A chain of late-bound tokens, none of which is looked at before the next is asked for."""
    queue.set_queue_priority(3)
    kv, hidden = prefill(queue, tokens)
    sampled = []
    for at in range(len(tokens), len(tokens) + 6):
        token = queue.sample(hidden, lazy=True)
        sampled.append(token)
        hidden = queue.forward(queue.embed_txt([token], at), read=kv[:at], write=kv[at : at + 1])
    return gather(*sampled).result()


def stops(queue: Queue, tokens: list[int]) -> object:
    """What comes behind a stop token is dropped."""
    kv, hidden = prefill(queue, tokens)
    first = queue.sample(hidden)
    stop = first.result()
    again = queue.sample(hidden, stop=[stop] if stop is not None else [], rebind=first)
    after = queue.forward(queue.embed_txt([again], len(tokens)), read=kv[: len(tokens)])
    dropped = queue.sample(after)
    dist = queue.get_next_dist(after, 4)
    return again.result(), dropped.result(), len(dist.result())


def shapes(queue: Queue, tokens: list[int]) -> object:
    """All that a sample can have."""
    _, hidden = prefill(queue, tokens)
    history = queue.alloc_history(tokens)
    history.extend([tokens[0], tokens[1]])
    allowed = np.zeros(queue.model.vocab_size, np.bool_)
    allowed[100:140] = True
    token = queue.sample(
        hidden,
        mask=allowed,
        history=history,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        bias={120: 3.0, 121: -2.5},
        temperature=0.75,
        top_k=20,
        top_p=0.5,
        min_p=0.125,
        seed=7,
        logprobs=True,
        k=4,
    )
    value = token.result()
    assert token.logprob is not None and token.distribution is not None
    return value, f"{token.logprob:.3f}", token.distribution.ids.tolist()


def distributions(queue: Queue, tokens: list[int]) -> object:
    _, hidden = prefill(queue, tokens)
    few, all_of_them = queue.get_next_dist(hidden, 3), queue.get_next_dist(hidden, 1 << 20)
    gather(few, all_of_them).result()
    return few.result().ids.tolist(), len(all_of_them.result())


def pages(queue: Queue, tokens: list[int]) -> object:
    size = queue.get_kvpage_size()
    kv, _ = prefill(queue, tokens, 4 * size)
    copy = queue.alloc_kvpage(1)
    queue.copy_kvpage(kv[:2], copy[:2])
    queue.mask_kvpage(copy[1:2], visible=False)
    shared = queue.share_kvpage(kv[:size])
    queue.dealloc_kvpage(kv[2 * size : 3 * size])
    at = len(tokens)
    hidden = queue.forward(queue.embed_txt([tokens[-1]], at), read=[shared[:at], copy[:2]])
    masked = queue.forward(
        queue.embed_txt([tokens[-1]], [at]),
        read=shared[:at],
        positions=[at],
        mask=(np.arange(at + 1) % 2 == 0)[None],
    )
    return queue.sample(hidden).result(), queue.sample(masked).result()


def vectors(queue: Queue, tokens: list[int]) -> object:
    """Hidden states out and in again, if the model has them; else `missing_trait`."""
    _, hidden = prefill(queue, tokens)
    values = queue.read_emb(hidden).result()
    back = queue.read_emb(queue.write_emb(values, [len(tokens)])).result()
    return values.shape, bool((values == back).all())


def written(queue: Queue, tokens: list[int]) -> object:
    queue.write_emb(np.zeros((2, queue.model.hidden_size), np.float32))
    return queue.synchronize().result()


def exports(queue: Queue, tokens: list[int]) -> object:
    kv, _ = prefill(queue, tokens)
    page = kv[: queue.model.page_size]
    queue.export_kvpage("here", page, meta=b"m" * 300, lease=60).result()
    listed = [(e.name, e.pages, e.seconds_left is not None) for e in list_exported("he").result()]
    imported = queue.import_kvpage("here").result()
    hidden = queue.forward(queue.embed_txt([5], len(tokens)), read=imported.kv[: len(tokens)])
    said = queue.sample(hidden).result()
    unexport_kvpage("here").result()
    return listed, len(imported.kv), zlib.crc32(imported.meta), said


DEVICE: dict[str, Callable[[Queue, list[int]], object]] = {
    "chain": chain,
    "stops": stops,
    "sample": shapes,
    "get_next_dist": distributions,
    "pages": pages,
    "vectors": vectors,
    "write_emb": written,
    "exports": exports,
}


def at_once(model: Model, tokens: list[int]) -> object:
    """Answers of several queues and of none, all waited for together."""
    with model.queue() as one, model.queue() as other:
        answers: list[Future[Any]] = [
            queue.sample(prefill(queue, tokens)[1]) for queue in (one, other)
        ]
        answers += [
            one.synchronize(),
            store_get("nothing"),
            model.tokenize("a b c"),
            other.synchronize(),
            store_exists("nothing"),
        ]
        return gather(*answers).result()


# --- errors -------------------------------------------------------------------------------------


def too_many_pages(queue: Queue, tokens: list[int]) -> None:
    queue.alloc_kvpage(queue.runtime.startup.limits.kv_pages + 1)
    queue.synchronize().result()


def into_a_shared_page(queue: Queue, tokens: list[int]) -> None:
    kv, _ = prefill(queue, tokens)
    shared = queue.share_kvpage(kv[: queue.model.page_size])
    queue.mask_kvpage(kv[:1], visible=False)
    queue.synchronize().result()
    assert shared


def of_nothing(queue: Queue, tokens: list[int]) -> None:
    queue.sample(queue.alloc_emb()).result()


def too_far(queue: Queue, tokens: list[int]) -> None:
    queue.embed_txt([5], queue.model.max_context)
    queue.synchronize().result()


def no_such_token(queue: Queue, tokens: list[int]) -> None:
    queue.embed_txt([queue.model.vocab_size])
    queue.synchronize().result()


def of_freed_pages(queue: Queue, tokens: list[int]) -> None:
    kv, _ = prefill(queue, tokens)
    queue.dealloc_kvpage(kv[: queue.model.page_size])
    queue.mask_kvpage(kv[:1], visible=False)
    queue.synchronize().result()


def dropped(queue: Queue, tokens: list[int]) -> None:
    """The sample and the cancel are in one frame, so the accelerator has not begun."""
    _, hidden = prefill(queue, tokens)
    token = queue.sample(hidden)
    queue.cancel()
    token.result()


def nowhere(queue: Queue, tokens: list[int]) -> None:
    queue.import_kvpage("nowhere").result()


WRONG: dict[str, Callable[[Queue, list[int]], object]] = {
    "over_quota": too_many_pages,
    "shared_page": into_a_shared_page,
    "unwritten": of_nothing,
    "bad_position": too_far,
    "bad_argument": no_such_token,
    "bad_span": of_freed_pages,
    "not_found": nowhere,
    "cancelled": dropped,
}


# --- services -----------------------------------------------------------------------------------


def store() -> object:
    store_set("key", b"\x00value" * 60).result()
    found = [store_get("key").result(), store_exists("key").result(), store_list("k").result()]
    return *found, store_delete("key").result(), store_get("key").result()


def broadcasts() -> object:
    with subscribe("topic") as all_of_them, subscribe("topic", job=True) as of_job:
        gather(all_of_them.subscribed, of_job.subscribed).result()
        counts = [broadcast("topic", "one").result(), broadcast("topic", "two", job=True).result()]
        return counts, all_of_them.receive().result().text, of_job.receive().result().text


def lagging() -> object:
    """More than 1 MiB waits."""
    with subscribe("much") as messages:
        messages.subscribed.result()
        gather(*(broadcast("much", bytes(60_000)) for _ in range(20))).result()
        kept = 0
        while (error := named(lambda: messages.receive().result())) == "none":
            kept += 1
        return kept, error


def children() -> object:
    with spawn(args=["--role", CHILD]) as child:
        child.send("to the child").result()
        came = child.receive().result()
        child.close()
        code = child.wait().result()
        return came, named(lambda: child.receive().result()), code


def left() -> object:
    return sorted(quota().result())[:4]


SERVICES: dict[str, Callable[[], object]] = {
    "store": store,
    "broadcasts": broadcasts,
    "lagged": lagging,
    "children": children,
    "quota": left,
    "no such child": lambda: named(lambda: spawn("nobody").id.result()),
    "unavailable": lambda: named(lambda: spawn("no_program").id.result()),
    "denied": lambda: named(lambda: http_get("http://192.0.2.1/").status),
}


def fetch(url: str) -> object:
    with http_get(url, headers={"x-conform": "1"}) as response:
        return response.status, response.read().result()


def post(url: str) -> object:
    def parts() -> Iterator[bytes]:
        yield b"first "
        yield b"second"

    with http_post(url, parts()) as response:
        return response.status, response.read().result()


# --- messages -----------------------------------------------------------------------------------


def next_input() -> object:
    try:
        return receive().result()
    except InferletError as error:
        return error.name


def echo() -> None:
    """The child: says back what it is told, until there is nothing more."""
    while True:
        try:
            send(receive().result())
        except InferletError:
            return


@inferlet
def conformance(model: Model, url: str = "", role: str = "") -> None:
    """`url`: of a server that sends what it gets; without one the steps of HTTP are left out."""
    if role == CHILD:
        echo()
        return
    tokens = [5, 6, 7, 8, 9]  # if it fails

    def tokenize() -> object:
        tokens[:] = model.tokenize(TEXT).result()
        return tokens

    step("tokenize", tokenize)
    step("chat", lambda: model.chat([{"role": "user", "content": TEXT}]).result())
    step("receive", lambda: [next_input() for _ in range(2)])
    for name, act in {**DEVICE, **WRONG}.items():
        with_queue(name, model, tokens, act)
    step("queues", lambda: at_once(model, tokens))
    for name, act_alone in SERVICES.items():
        step(name, act_alone)
    if url:
        step("http_get", lambda: fetch(url))
        step("http_post", lambda: post(url))
