"""Saved contexts: their octets, their parts, and what is refused."""

from __future__ import annotations

import pytest
from inferlet import (
    ArgumentError,
    Context,
    InferletError,
    NotFoundError,
    PositionError,
    QuotaError,
    abi,
    saved,
    unsave,
)
from scripted import Host
from scripted_device import PAGE_SIZE, continuation

PROMPT = list(range(50))


def test_the_octets_of_a_part() -> None:
    meta = bytes.fromhex(
        "50494543 01 02000000 05400000 04400000 010000 ff0300 ffff01".replace(" ", "")
    )
    part = saved.Part(2, 16389, 16388, [1, 1023, 131071])
    assert saved.pack_part(part) == meta
    assert saved.unpack_part("x", meta) == part


def test_saved_and_restored_it_goes_on_the_same(attached: Host) -> None:
    with attached.model.context(PROMPT) as context:
        made = list(context.generate_tokens(5))
        context.save("a book", lease=60)
        attached.settle()
        (export,) = attached.controller.of(abi.ExportKvPage)
        assert (export.name, export.lease, sum(c for _, _, c in export.pages)) == ("a book", 60, 7)
        tokens = PROMPT + made
        before = len(attached.controller.of(abi.Forward))
        with attached.model.restore("a book") as restored:
            assert restored.tokens == tokens
            assert restored.stats.prompt_tokens == 55 and restored.stats.shared_pages == 7
            assert list(restored.generate_tokens(30)) == continuation(tokens, 30)
        # nothing but the last token was computed again
        inputs = sum(f.inputs[2] for f in attached.controller.of(abi.Forward)[before:])
        assert inputs == 30
        # and the saved one does not notice, nor the context it was made from
        assert list(context.generate_tokens(9)) == continuation(tokens, 9)
        with Context.restore(attached.model, "a book") as again:
            assert list(again.generate_tokens(9)) == continuation(tokens, 9)


def test_a_long_context_is_saved_in_parts(attached: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "PART_TOKENS", 2 * PAGE_SIZE)
    with attached.model.context(PROMPT) as context:
        context.save("long")
        exports = attached.controller.of(abi.ExportKvPage)
        # the first last, so that who sees it can have them all
        assert [e.name for e in exports] == ["long#3", "long#2", "long#1", "long"]
        with attached.model.restore("long") as restored:
            assert restored.tokens == PROMPT
            restored.trim(35)
            assert list(restored.generate_tokens(9)) == continuation(PROMPT[:35], 9)
        unsave("long")
        attached.settle()
        assert not attached.controller.exports
        with pytest.raises(NotFoundError):
            attached.model.restore("long")


def test_a_name_in_use_leaves_nothing_half_saved(
    attached: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved, "PART_TOKENS", 2 * PAGE_SIZE)
    with attached.model.context(PROMPT[:5]) as first, attached.model.context(PROMPT) as second:
        first.save("mine")
        with pytest.raises(ArgumentError, match="'mine' is taken"):
            second.save("mine")
        assert list(attached.controller.exports) == ["mine"]
        inputs = len(attached.controller.of(abi.Forward))
        second.save("other")
        assert len(attached.controller.of(abi.Forward)) == inputs, "nothing is computed again"
        assert list(second.generate_tokens(3)) == continuation(PROMPT, 3)


def speaks_of_saved_contexts(error: InferletError, hint: str) -> bool:
    return (
        hint in error.hint and "export_kvpage" not in str(error) and "no export" not in str(error)
    )


def test_errors_speak_of_saved_contexts(attached: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "PART_TOKENS", 2 * PAGE_SIZE)
    with attached.model.context(PROMPT) as context:
        with pytest.raises(NotFoundError, match="no saved context has the name 'a'") as missing:
            attached.model.restore("a")
        assert speaks_of_saved_contexts(missing.value, "save it first")
        with pytest.raises(NotFoundError, match="no saved context has the name 'a'") as missing:
            unsave("a")
        assert speaks_of_saved_contexts(missing.value, "save it first")
        context.save("a")
        with pytest.raises(ArgumentError, match="'a#3' is taken") as taken:
            context.save("a")
        assert speaks_of_saved_contexts(taken.value, "unsave('a') first")
        del attached.controller.exports["a#2"]
        with pytest.raises(NotFoundError, match="part of the saved context 'a' is gone") as gone:
            attached.model.restore("a")
        assert speaks_of_saved_contexts(gone.value, "unsave('a')")
        unsave("a")
        assert not attached.controller.exports
        with attached.model.context([1] * 390) as long:
            long.save("b")
            with attached.model.context([2] * 390) as more:
                more.save("c")
                with pytest.raises(QuotaError) as full:
                    context.save("d")
        assert speaks_of_saved_contexts(full.value, "unsave what is done with")
        assert list(context.generate_tokens(3)) == continuation(PROMPT, 3)


def test_what_cannot_be_saved(host: Host) -> None:
    with host.model.context() as context:
        with pytest.raises(ArgumentError, match="empty"):
            context.save("x")
        context.fill(PROMPT)
        context.mask(3, 5)
        with pytest.raises(ArgumentError, match="tokens 3 to 4 are hidden"):
            context.save("x")
        context.mask(3, 5, visible=True)
        for name in ("", "x" * 257):
            with pytest.raises(ArgumentError, match="octets"):
                context.save(name)
        assert list(context.generate_tokens(3)) == continuation(PROMPT, 3)


def meta(
    parts: int = 1, length: int = 3, written: int = 3, tokens: tuple[int, ...] = (1, 2, 3)
) -> bytes:
    return saved.pack_part(saved.Part(parts, length, written, list(tokens)))


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"notes of mine",
        meta()[:-1],
        meta().replace(b"PIEC\x01", b"PIEC\x02"),
        meta(parts=0),
        meta(parts=2),
        meta(length=4),
        meta(written=4),
        meta(written=9, length=9, tokens=tuple(range(9))),
        meta(tokens=(1, 2, 300)),
        meta(length=0, written=0, parts=0, tokens=()),
    ],
)
def test_what_is_no_saved_context(attached: Host, wrong: bytes) -> None:
    with attached.model.queue() as queue:
        queue.export_kvpage("x", queue.alloc_kvpage(1), meta=wrong).result()
        with pytest.raises(ArgumentError, match="no saved context"):
            attached.model.restore("x")
    assert not attached.controller.broken


def test_a_context_longer_than_the_models(attached: Host) -> None:
    with attached.model.queue() as queue:
        long = meta(length=401, written=401, tokens=(1,) * 401)
        queue.export_kvpage("x", queue.alloc_kvpage(60), meta=long).result()
        with pytest.raises(PositionError, match="'x' has 401 tokens"):
            attached.model.restore("x")


def test_more_pages_than_needed_are_given_back(attached: Host) -> None:
    with attached.model.queue() as queue:
        pages = queue.alloc_kvpage(4)
        queue.forward(queue.embed_txt([1, 2, 3]), write=pages[:3])
        queue.export_kvpage("x", pages, meta=meta()).result()
        with attached.model.restore("x") as restored:
            assert restored.stats.pages == 1
            assert list(restored.generate_tokens(20)) == continuation([1, 2, 3], 20)
