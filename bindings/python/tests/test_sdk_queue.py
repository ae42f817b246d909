"""The explicit calls on a queue."""

from __future__ import annotations

import gc
import struct
from collections.abc import Callable

import numpy as np
import pytest
from inferlet import (
    ArgumentError,
    CancelledError,
    HandleError,
    MaskError,
    PositionError,
    QuotaError,
    SharedPageError,
    SpanError,
    UnwrittenError,
    abi,
)
from scripted import Host
from scripted_device import EOS, PAGE_SIZE, RING_BYTES, VOCAB_SIZE, continuation, next_token


def test_the_listing_of_the_paper(host: Host) -> None:
    """design.md section 3, word for word but for what it leaves out."""
    model = host.model
    tokens = model.tokenize("The capital").result()
    max_tokens, got = 12, []
    with model.queue() as q:  # leaving it frees what it allocated
        kv = q.alloc_kv(len(tokens) + max_tokens)
        out = q.forward(q.embed_txt(tokens), write=kv[: len(tokens)])
        for pos in range(len(tokens), len(kv)):
            token = q.get_next_dist(out[-1]).result().argmax()
            got.append(token)
            out = q.forward(q.embed_txt([token], [pos]), read=kv[:pos], write=kv[pos : pos + 1])
    assert got == continuation(tokens, max_tokens)
    host.settle()
    controller = host.controller
    assert not (controller.kv or controller.embs or controller.tokens or controller.queues)


def test_late_bound_tokens(host: Host) -> None:
    """A loop of steps in one frame: no token is known here before all are computed."""
    with host.model.queue() as q:
        kv = q.alloc_kv(20)
        out = q.forward(q.embed_txt([1, 2, 3]), write=kv[:3])
        tokens = [q.sample(out)]
        for pos in range(3, 9):
            out = q.forward(q.embed_txt(tokens[-1:], pos), read=kv[:pos], write=kv[pos])
            tokens.append(q.sample(out))
        assert [token.result() for token in tokens] == continuation([1, 2, 3], 7)
    assert len(host.controller.frames) == 1


def test_handles_are_freed_with_their_last_span(host: Host) -> None:
    with host.model.queue() as q:
        kv, embs = q.alloc_kv(30), q.alloc_emb(5)
        part = kv[3:9][1:]
        token = q.sample(q.forward(q.embed_txt([1])))
        token.result()
        del kv
        gc.collect()
        host.settle()
        assert host.controller.kv and host.controller.tokens
        frames = len(host.controller.frames)
        del part, embs, token
        gc.collect()
        assert len(host.controller.frames) == frames  # a release sends nothing by itself
        host.settle()
        assert not (host.controller.kv or host.controller.embs or host.controller.tokens)
        q.synchronize().result()


def test_spans_are_sequences(host: Host) -> None:
    with host.model.queue() as q:
        kv = q.alloc_kv(20)
        assert len(kv) == 20 and len(kv[5:]) == 15 and len(kv[:-1]) == 19 and len(kv[30:]) == 0
        assert kv[5:][2:4].wire == (kv.handle.number, 7, 2)
        assert kv[-1].wire == (kv.handle.number, 19, 1)
        assert [s.first for s in q.alloc_emb(3)] == [0, 1, 2]
        with pytest.raises(IndexError):
            kv[20]
        with pytest.raises(ArgumentError, match="step"):
            kv[::2]


def test_distributions_are_views_of_the_ring(host: Host) -> None:
    with host.model.queue() as q:
        out = q.forward(q.embed_txt([1, 2, 3]))
        dist = q.get_next_dist(out, k=5).result()
        first = next_token(((0, 1), (1, 2), (2, 3)))
        assert dist.ids.dtype == np.uint32 and dist.probs.dtype == np.float32
        assert dist.ids.tolist() == [first + i for i in range(5)] and len(dist) == 5
        assert dist.probs.tolist() == [0.5, 0.25, 0.125, 0.0625, 0.03125]
        assert dist.argmax() == first
        with pytest.raises(ValueError, match="read-only"):
            dist.ids[0] = 1
        copy = dist.copy()
        (command,) = host.controller.of(abi.GetNextDist)
        struct.pack_into("<I", host.ring, command.offset, 77)
        assert dist.ids[0] == 77 and copy.ids[0] == first
        dist.release()
        with pytest.raises(ArgumentError, match="released"):
            dist.argmax()


def test_a_place_in_the_ring_is_used_again_only_when_nothing_looks_at_it(host: Host) -> None:
    with host.model.queue() as q:
        out = q.forward(q.embed_txt([1]))
        k = VOCAB_SIZE
        fit = RING_BYTES // (-(-8 * k // 64) * 64)
        held = [q.get_next_dist(out, k).result() for _ in range(fit)]
        with pytest.raises(QuotaError, match="ring"):
            q.get_next_dist(out, k)
        view = held[1].probs[3:]  # outlives its distribution
        held[1].release()
        del held[1]
        gc.collect()
        with pytest.raises(QuotaError):
            q.get_next_dist(out, k)
        before = view.tolist()
        del held[0]
        gc.collect()
        q.get_next_dist(out, k).result()
        assert view.tolist() == before
        offsets = [c.offset for c in host.controller.of(abi.GetNextDist)]
        assert offsets[-1] == offsets[0] and len(set(offsets)) == fit
        del view, held
        gc.collect()
        small = [q.get_next_dist(out, 1).result() for _ in range(RING_BYTES // 64)]
        del small[::2]
        with pytest.raises(QuotaError):
            q.get_next_dist(out, 9)  # every other 64 octets are free
        small.clear()
        gc.collect()
        q.get_next_dist(out, k).result()  # neighbours have grown together again


def test_a_place_is_kept_until_its_answer_even_if_nobody_waits(host: Host) -> None:
    with host.model.queue() as q:
        out = q.forward(q.embed_txt([1]))
        for _ in range(2):
            q.get_next_dist(out, 4)
            gc.collect()
        q.synchronize().result()
        offsets = [c.offset for c in host.controller.of(abi.GetNextDist)]
        assert len(set(offsets)) == 2
        q.get_next_dist(out, 4).result()
        assert host.controller.of(abi.GetNextDist)[-1].offset in offsets


def test_k_beyond_the_vocabulary_gives_the_vocabulary(host: Host) -> None:
    with host.model.queue() as q:
        out = q.forward(q.embed_txt([1]))
        assert len(q.get_next_dist(out, 10**6).result()) == VOCAB_SIZE
        with pytest.raises(ArgumentError):
            q.get_next_dist(out, 0)


def test_a_stop_drops_the_rest_of_a_chain(make_host: Callable[..., Host]) -> None:
    host = make_host(rule=lambda seen: EOS if len(seen) == 3 else 65)
    with host.model.queue() as q:
        kv = q.alloc_kv(10)
        out = q.forward(q.embed_txt([1]), write=kv[0])
        tokens = [q.sample(out, stop=[EOS])]
        for pos in range(1, 6):
            out = q.forward(q.embed_txt(tokens[-1:], pos), read=kv[:pos], write=kv[pos])
            tokens.append(q.sample(out, stop=[EOS]))
        dist = q.get_next_dist(out)
        assert [t.result() for t in tokens] == [65, 65, EOS, None, None, None]
        assert len(dist.result()) == 0
        with pytest.raises(UnwrittenError, match="stop"):
            dist.result().argmax()


def test_masks_are_packed_rows(host: Host) -> None:
    with host.model.queue() as q:
        kv = q.alloc_kv(9)
        q.forward(q.embed_txt(list(range(9))), write=kv)
        mask = np.zeros((2, 11), np.bool_)
        mask[0, [0, 8, 9]] = mask[1, [2, 10]] = True
        out = q.forward(q.embed_txt([50, 51], 9), read=kv, outputs=2, mask=mask)
        assert q.sample(out[0]).result() == next_token(((0, 0), (8, 8), (9, 50)))
        assert q.sample(out[1]).result() == next_token(((2, 2), (10, 51)))
        with pytest.raises(MaskError, match=r"\(2, 11\)"):
            q.forward(q.embed_txt([50, 51], 9), read=kv, mask=mask[:, :10])


def test_pages_can_be_shared_masked_copied_and_freed_in_part(host: Host) -> None:
    with host.model.queue() as q:
        kv = q.alloc_kv(3 * PAGE_SIZE)
        q.forward(q.embed_txt(list(range(3 * PAGE_SIZE))), write=kv)
        shared = q.share_kvpage(kv[PAGE_SIZE:])
        with pytest.raises(SharedPageError):
            q.mask_kvpage(shared[:2], False)
            q.synchronize().result()
        q.mask_kvpage(kv[2:4], False)
        own = q.alloc_kvpage()
        assert len(own) == q.get_kvpage_size() == PAGE_SIZE
        q.copy_kvpage(shared[:3], own[4:7])
        out = q.forward(q.embed_txt([99], 24), read=[kv[:6], own[4:7], kv[:0]])
        seen = [(0, 0), (1, 1), (4, 4), (5, 5), (8, 8), (9, 9), (10, 10), (24, 99)]
        assert q.sample(out).result() == next_token(tuple(seen))
        q.dealloc_kvpage(kv[: 2 * PAGE_SIZE])
        q.forward(q.embed_txt([99], 24), read=kv[PAGE_SIZE:])
        with pytest.raises(SpanError):
            q.synchronize().result()
        assert host.controller.pages_held == 4 - 1
        with pytest.raises(SpanError, match="page size"):
            q.share_kvpage(kv[3:])


def test_an_error_stops_the_queue_until_synchronize(host: Host) -> None:
    with host.model.queue() as q:
        empty = q.alloc_emb(1)
        bad = q.sample(empty)
        later = q.sample(q.forward(q.embed_txt([1])))
        for future in (bad, later):
            with pytest.raises(UnwrittenError):
                future.result()
        with pytest.raises(UnwrittenError):
            q.synchronize().result()
        assert q.sample(q.forward(q.embed_txt([1]))).result() == continuation([1], 1)[0]


def test_what_was_never_made_is_freed_without_another_error(make_host: Callable[..., Host]) -> None:
    host = make_host(kv_pages=10)
    with host.model.queue() as q:
        kept = q.alloc_kvpage(2)
        kv = q.alloc_kvpage(11)
        with pytest.raises(QuotaError):
            q.synchronize().result()
        kv = q.alloc_kvpage(4)  # lets go of the one that failed
        gc.collect()
        q.synchronize().result()
        del kept, kv
        gc.collect()
        q.synchronize().result()
        assert host.controller.pages_held == 0


def test_cancel_and_priority(host: Host) -> None:
    host.controller.hold_after = 0
    with host.model.queue() as q:
        q.set_queue_priority(-8)
        q.set_queue_priority(7)
        for priority in (-9, 8):
            with pytest.raises(ArgumentError):
                q.set_queue_priority(priority)
        token = q.sample(q.forward(q.embed_txt([1])))
        assert not token.done()
        q.cancel()
        with pytest.raises(CancelledError):
            token.result()
        q.synchronize().result()
    assert [c.priority for c in host.controller.of(abi.SetQueuePriority)] == [-8, 7]


def test_freed_and_destroyed_handles_are_refused_here(host: Host) -> None:
    with host.model.queue() as q:
        kv, emb = q.alloc_kv(4), q.embed_txt([1, 2])
        q.dealloc_kvpage(kv)
        q.dealloc_emb(emb)
        with pytest.raises(HandleError, match="freed"):
            q.forward(emb)
        with pytest.raises(HandleError, match="freed"):
            q.mask_kvpage(kv, False)
        q.synchronize().result()
        left = q.alloc_emb()
    with pytest.raises(HandleError, match="destroyed"):
        q.alloc_kv(1)
    with host.model.queue() as other, pytest.raises(HandleError, match="destroyed"):
        other.get_next_dist(left)


def test_arguments_that_no_frame_can_carry_are_refused_here(host: Host) -> None:
    with host.model.queue() as q:
        for wrong in (-1, 2**31):
            with pytest.raises(ArgumentError, match="token id"):
                q.embed_txt([wrong])
            with pytest.raises(PositionError):
                q.embed_txt([1], wrong)
            with pytest.raises(PositionError):
                q.embed_txt([1], [wrong])
        with pytest.raises(PositionError):
            q.embed_txt([1, 2], 2**31 - 1)
        with pytest.raises(PositionError, match="1 positions for 2"):
            q.embed_txt([1, 2], [1])
        for count in (0, -1):
            with pytest.raises(ArgumentError):
                q.alloc_kv(count)
            with pytest.raises(ArgumentError):
                q.alloc_emb(count)
        with pytest.raises(SpanError, match="one embed"):
            q.sample(q.alloc_emb(2))
        with pytest.raises(SpanError):
            q.forward(q.embed_txt([1]), outputs=2)
        with pytest.raises(ArgumentError, match="octets"):
            host.model.tokenize("x" * 40000)
        with pytest.raises(ArgumentError, match="octets"):
            host.runtime.send(b"x" * 60001)
        q.synchronize().result()


def test_numpy_numbers_are_numbers(host: Host) -> None:
    ids = np.array([5, 6, 7], np.uint32)
    with host.model.queue() as q:
        kv = q.alloc_kv(3)
        out = q.forward(q.embed_txt(ids, np.arange(3)), write=kv[: np.int64(3)])
        assert q.sample(out[np.int64(-1)]).result() == continuation([5, 6, 7], 1)[0]
        again = q.forward(q.embed_txt([8], np.int64(3)), read=kv)
        assert (
            q.sample(again, temperature=np.float32(0)).result() == continuation([5, 6, 7, 8], 1)[0]
        )


def test_long_texts_are_embedded_in_several_commands(host: Host) -> None:
    with host.model.queue() as q:
        emb = q.embed_txt([i % 256 for i in range(10000)], 3)
        q.synchronize().result()
        assert host.controller.embs[emb.handle.number] == [
            ("text", i % 256, i + 3) for i in range(10000)
        ]
        q.embed_txt([1] * 5000, list(range(5000)), into=emb[:5000])
        q.synchronize().result()
        assert host.controller.embs[emb.handle.number][4999] == ("text", 1, 4999)
    assert len(host.controller.of(abi.EmbedTxt)) == 5


def test_what_a_cancel_dropped_is_freed_without_an_error(host: Host) -> None:
    host.controller.hold_after = 0
    with host.model.queue() as q:
        held = q.sample(q.forward(q.embed_txt([1])))
        kv = q.alloc_kvpage(3)  # behind the sample that waits
        q.cancel()
        with pytest.raises(CancelledError):
            held.result()
        del held, kv
        gc.collect()
        q.synchronize().result()
        token = q.sample(q.forward(q.embed_txt([1])))
        assert token.result() == continuation([1], 1)[0]
        q.dealloc_token(token)
        q.synchronize().result()
    assert not host.controller.tokens and not host.controller.pages_held
