"""KV pages by name: exported and imported."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from inferlet import (
    ArgumentError,
    NotFoundError,
    SharedPageError,
    SpanError,
    abi,
    unexport_kvpage,
)
from scripted import Host
from scripted_device import (
    PAGE_SIZE,
    next_token,
)


def test_pages_are_exported_and_imported(host: Host) -> None:
    with host.model.queue() as q, host.model.queue() as other:
        first, second = q.alloc_kvpage(2), q.alloc_kvpage(2)
        count = 3 * PAGE_SIZE + 2
        q.forward(q.embed_txt(list(range(16))), write=first)
        q.forward(q.embed_txt(list(range(16, count)), 16), read=first, write=second[: count - 16])
        q.export_kvpage("doc", [first, second[: count - 16]], meta="m\u00e9ta", lease=1.5).result()
        imported = other.import_kvpage("doc").result()
        assert imported.meta == "m\u00e9ta".encode() and len(imported.kv) == 4 * PAGE_SIZE
        out = other.forward(other.embed_txt([99], count), read=imported.kv[:count])
        seen = [(i, i) for i in range(count)] + [(count, 99)]
        assert other.sample(out).result() == next_token(tuple(seen))
        with pytest.raises(SharedPageError):
            q.mask_kvpage(first[:1], False)
            q.synchronize().result()
    (command,) = host.controller.of(abi.ExportKvPage)
    assert [r[1:] for r in command.pages] == [(0, 2), (0, 2)] and command.lease == 2


def test_imported_pages_are_freed_with_their_last_span(host: Host) -> None:
    with host.model.queue() as q:
        q.export_kvpage("doc", q.alloc_kvpage(2))
        kv = q.import_kvpage("doc").result().kv
        part = kv[PAGE_SIZE:]
        del kv
        gc.collect()
        q.synchronize().result()
        assert host.controller.kv
        del part
        q.import_kvpage("doc")  # nobody looks at it
        q.synchronize().result()
        gc.collect()
        q.synchronize().result()
        assert not host.controller.kv


def test_an_import_that_fails_leaves_the_queue_usable(host: Host) -> None:
    with host.model.queue() as q:
        for _ in range(2):
            failed, reported = q.import_kvpage("nothing"), q.synchronize()
            with pytest.raises(NotFoundError):
                reported.result()
            with pytest.raises(NotFoundError):
                failed.result()
            del failed
            gc.collect()
            q.synchronize().result()
    assert not host.controller.of(abi.DeallocKvPage)


def test_unexport(attached: Host) -> None:
    with attached.model.queue() as q:
        q.export_kvpage("doc", q.alloc_kvpage()).result()
        with pytest.raises(ArgumentError, match="in use"):
            q.export_kvpage("doc", q.alloc_kvpage()).result()
        assert unexport_kvpage("doc").result() is None
        with pytest.raises(NotFoundError):
            unexport_kvpage("doc").result()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"name": ""}, ArgumentError),
        ({"name": 5}, ArgumentError),
        ({"meta": "x" * 60001}, ArgumentError),
        ({"meta": 5}, ArgumentError),
        ({"lease": 0}, ArgumentError),
        ({"lease": -1.0}, ArgumentError),
        ({"lease": float("nan")}, ArgumentError),
        ({"lease": "soon"}, ArgumentError),
        ({"spans": []}, ArgumentError),
        ({"spans": [5]}, ArgumentError),
    ],
)
def test_wrong_exports_are_refused_here(
    host: Host, options: dict[str, Any], error: type[Exception]
) -> None:
    with host.model.queue() as q:
        kv = q.alloc_kvpage(3)
        with pytest.raises(error):
            q.export_kvpage(**{"name": "n", "spans": kv, **options})
        for spans in (kv[1:], [kv[:9], kv[16:]], [kv[:0]]):
            with pytest.raises(SpanError):
                q.export_kvpage("n", spans)
        q.synchronize().result()
    assert not host.controller.of(abi.ExportKvPage)
