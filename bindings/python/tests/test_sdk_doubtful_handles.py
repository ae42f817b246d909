"""Handles of which it is not known whether they were ever made: freeing them hides no error and
makes none."""

from __future__ import annotations

import gc

import pytest
from inferlet import CancelledError, HandleError, KvSpan, Queue, QuotaError, UnwrittenError, abi
from scripted import Host
from scripted_device import continuation


def cancelled(host: Host, queue: Queue) -> KvSpan:
    """Pages whose allocation a cancel has dropped."""
    host.controller.hold_after = host.controller.samples
    held = queue.sample(queue.forward(queue.embed_txt([1])))
    kv = queue.alloc_kvpage(3)  # behind the sample that waits
    queue.cancel()
    with pytest.raises(CancelledError):
        held.result()
    return kv


def works(queue: Queue) -> bool:
    token = queue.sample(queue.forward(queue.embed_txt([1])))
    return token.result() == continuation([1], 1)[0]


def test_an_error_before_is_reported_by_the_next_synchronize(host: Host) -> None:
    with host.model.queue() as queue:
        kv = cancelled(host, queue)
        host.controller.fail_next = (abi.AllocKvPage, QuotaError("no page is left", "free one"))
        queue.alloc_kvpage(1)  # nobody looks
        del kv
        gc.collect()
        with pytest.raises(QuotaError, match="no page is left"):
            queue.synchronize().result()
        queue.synchronize().result()
        assert works(queue)


def test_an_error_of_the_program_about_that_very_handle_is_reported_too(host: Host) -> None:
    with host.model.queue() as queue:
        kv = cancelled(host, queue)
        queue.forward(queue.embed_txt([1]), read=kv)  # it was never made; nobody looks
        del kv
        gc.collect()
        with pytest.raises(HandleError):
            queue.synchronize().result()
        queue.synchronize().result()
        assert works(queue)


def test_the_first_of_two_errors_is_reported(host: Host) -> None:
    with host.model.queue() as queue:
        kv = cancelled(host, queue)
        host.controller.fail_next = (abi.AllocKvPage, QuotaError("no page is left", "free one"))
        queue.alloc_kvpage(1)
        del kv
        gc.collect()
        with pytest.raises(UnwrittenError):
            queue.sample(queue.alloc_emb(1)).result()
        with pytest.raises(QuotaError, match="no page is left"):
            queue.synchronize().result()
        queue.synchronize().result()


def test_a_synchronize_that_is_cancelled_leaves_the_error_to_the_next(host: Host) -> None:
    with host.model.queue() as queue:
        kv = cancelled(host, queue)
        host.controller.fail_next = (abi.AllocKvPage, QuotaError("no page is left", "free one"))
        queue.alloc_kvpage(1)
        del kv
        gc.collect()
        host.settle()
        host.controller.hold_after = host.controller.samples
        queue.embed_txt([1])  # it waits
        dropped = queue.synchronize()
        queue.cancel()
        with pytest.raises(CancelledError):
            dropped.result()
        with pytest.raises(QuotaError, match="no page is left"):
            queue.synchronize().result()


def test_a_second_cancel_leaves_no_error_of_a_free(host: Host) -> None:
    with host.model.queue() as queue:
        kv = cancelled(host, queue)
        host.controller.hold_after = host.controller.samples
        waits = queue.sample(queue.forward(queue.embed_txt([1])))
        del kv
        gc.collect()
        queue.cancel()  # the free is carried out, what follows it is not
        with pytest.raises(CancelledError):
            waits.result()
        assert works(queue)
        queue.synchronize().result()
        assert not host.controller.pages_held


def test_a_second_cancel_keeps_an_error_from_before(host: Host) -> None:
    with host.model.queue() as queue:
        cancelled(host, queue)
        queue.sample(queue.alloc_emb(1))  # fails, and nobody looks
        host.settle()
        queue.cancel()
        with pytest.raises(UnwrittenError):
            queue.synchronize().result()
        assert works(queue)
