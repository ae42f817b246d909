"""Contexts that C programs save and restore by name, before the real controller
(`c_contexts.Stand`); their form is that of docs/contexts.md."""

from __future__ import annotations

import struct
import threading

import pytest
from inferlet import abi

from . import c_fixtures
from .c_contexts import Stand, Text, error_of, failure, fill, generate, ok, stats_of, tokens_of
from .c_contexts import built as built
from .c_contexts import program as program
from .c_contexts import stand as stand
from .c_driver import Program, Tiny, answers, greedy, hexed, startup_block
from .controller_process import VOCAB, Peer

pytestmark = c_fixtures.needs_gcc


PROMPT = list(range(100, 130))  # three pages and six slots


def meta_of(tokens: list[int], written: int, parts: int = 1, total: int | None = None) -> bytes:
    head = struct.pack("<4sBIII", b"PIEC", 1, parts, total or len(tokens), written)
    return head + b"".join(t.to_bytes(3, "little") for t in tokens)


def exported(stand: Stand, meta: bytes, pages: int = 4) -> Peer:
    """A neighbour that exports empty pages as "other"."""
    _, peer = stand.controller.admit()
    peer.put(
        abi.CreateQueue(None, 1),
        abi.AllocKvPage(None, 1, 1, pages),
    )
    peer.ask(abi.ExportKvPage(peer.request(), 1, "other", [(1, 0, pages)], meta))
    return peer


def test_a_saved_context_has_the_documented_form(stand: Stand) -> None:
    with stand.program() as p:
        ok(p, "context 0")
        fill(p, PROMPT)
        new = generate(p, 5)
        ok(p, f"save {hexed(b'mine')} 60")
        _, peer = stand.controller.admit()
        peer.put(abi.CreateQueue(None, 1))
        pages, meta = peer.ask(abi.ImportKvPage(peer.request(), 1, 1, "mine"))
        assert pages == 5 and meta == meta_of(PROMPT + new, 35)
        assert error_of(p, f"save {hexed(b'mine')} nil")[0] == "bad_argument"  # the name is in use
        text = Text(PROMPT + new)
        assert generate(p, 9) == text.generate(9)  # it goes on in a page of its own
        ok(p, f"unsave {hexed(b'mine')}")
        assert error_of(p, f"restore 1 0 {hexed(b'mine')}")[0] == "not_found"
        assert p.end() == 0


def test_a_context_is_restored_by_another_inferlet(stand: Stand) -> None:
    """Also one that another binding saved, with tokens that are not written yet."""
    with stand.program() as p:
        ok(p, "context 0")
        fill(p, PROMPT)
        ok(p, f"save {hexed(b'mine')} 60")
        assert p.end() == 0
    with stand.program() as p:
        ok(p, f"restore 0 0 {hexed(b'mine')}")
        assert tokens_of(p) == PROMPT and stats_of(p)[:4] == [30, 0, 4, 4]
        ok(p, "fork 1")
        for at in (0, 1):
            p.do(f"use {at}")
            assert generate(p, 9) == Text([*PROMPT]).generate(9)
        assert p.end() == 0
    exported(stand, meta_of(PROMPT, 0))
    with stand.program() as p:
        ok(p, f"restore 0 0 {hexed(b'other')}")
        assert generate(p, 9) == Text([*PROMPT]).generate(9)
        assert p.end() == 0


def test_a_long_context_is_saved_in_parts_the_first_last() -> None:
    """More tokens than the meta of one export holds, before the scripted controller."""
    tokens = [2 + i * i % 251 for i in range(40000)]
    with Program(block=startup_block(max_context=50000)) as p:
        assert p.line() == "ok"
        tiny = Tiny(p)
        tiny.exports["long#x"] = tiny.exports["long#"] = ([], b"")  # no parts of it
        thread = threading.Thread(target=tiny.serve)
        thread.start()
        ok(p, "context 0")
        fill(p, tokens)
        ok(p, f"save {hexed(b'long')} nil")
        assert list(tiny.exports)[2:] == ["long#2", "long#1", "long"]
        for part in range(3):
            slots, meta = tiny.exports[f"long#{part}" if part else "long"]
            first = part * 16384
            of_part = tokens[first : first + 16384]
            assert meta == meta_of(of_part, 40000, parts=3, total=40000)
            assert slots == [(first + i, token) for i, token in enumerate(of_part)]
        ok(p, f"restore 1 0 {hexed(b'long')}")
        assert tokens_of(p) == tokens and generate(p, 3) == greedy(tokens, 3)
        ok(p, f"unsave {hexed(b'long')}")
        assert list(tiny.exports) == ["long#x", "long#"]
        assert p.end() == 0
        thread.join()


@pytest.mark.parametrize("lines", [["mask 2 3 0"], ["evict 0 8"]])
def test_hidden_tokens_cannot_be_saved(program: Program, lines: list[str]) -> None:
    assert error_of(program, f"save {hexed(b'n')} nil")[0] == "bad_argument"  # nor no tokens
    fill(program, PROMPT)
    ok(program, *lines)
    assert error_of(program, f"save {hexed(b'n')} nil")[0] == "bad_argument"
    assert program.end() == 0


WRONG_METAS = {
    "empty": b"",
    "another magic": b"PIEX" + meta_of(PROMPT, 30)[4:],
    "another version": b"PIEC\2" + meta_of(PROMPT, 30)[5:],
    "cut": meta_of(PROMPT, 30)[:-1],
    "more": meta_of(PROMPT, 30) + b"\0\0\0",
    "no tokens": meta_of([], 0),
    "more written than there are": meta_of(PROMPT, 31),
    "more written than pages": meta_of([1] * 40, 40),
    "too many parts": meta_of(PROMPT, 30, parts=2),
    "no parts": meta_of(PROMPT, 30, parts=0),
    "very many": meta_of(PROMPT, 30, parts=0x40000, total=0xFFFFFFFF),
    "beyond the context": meta_of([1] * 513, 30),
    "no token of the model": meta_of([*PROMPT[:29], VOCAB], 30),
}


@pytest.mark.parametrize("what", WRONG_METAS)
def test_what_is_no_saved_context_is_refused(stand: Stand, what: str) -> None:
    exported(stand, WRONG_METAS[what])
    with stand.program() as p:
        name, message = error_of(p, f"restore 0 0 {hexed(b'other')}")
        assert name in ("bad_argument", "bad_position") and "saved" in message
        ok(p, "context 0")
        fill(p, PROMPT)
        assert generate(p, 3) == Text([*PROMPT]).generate(3)
        assert p.end() == 0
    assert stand.controller.release(stand.seat).stats.kv_pages == 0


def test_a_name_that_is_too_long_is_refused(program: Program) -> None:
    fill(program, PROMPT)
    assert error_of(program, f"save {hexed(b'n' * 257)} nil")[0] == "bad_argument"
    assert error_of(program, f"restore 1 0 {hexed(b'n' * 257)}")[0] == "bad_argument"
    program.do("use 0")
    assert generate(program, 3) == Text([*PROMPT]).generate(3)
    assert program.end() == 0


def test_the_quota_of_exports_is_an_error_that_harms_nothing(stand: Stand) -> None:
    with stand.program(export_pages=2) as p:
        ok(p, "context 0")
        fill(p, PROMPT)
        p.do(f"save {hexed(b'n')} nil")
        name, _, hint = failure(p.line())
        assert name == "over_quota" and "pie_context_unsave " in hint
        assert "unexport" not in hint and hint.endswith("--quota export_pages")
        assert generate(p, 3) == Text([*PROMPT]).generate(3)
        assert p.end() == 0


def test_a_name_that_is_taken_or_missing_is_told_in_the_words_of_contexts(stand: Stand) -> None:
    other = exported(stand, meta_of(PROMPT, 30))
    with stand.program() as p:
        ok(p, "context 0")
        fill(p, PROMPT)
        ok(p, f"save {hexed(b'mine')} nil")
        for taken in (b"mine", b"other"):
            p.do(f"save {hexed(taken)} nil")
            name, message, hint = failure(p.line())
            assert name == "bad_argument" and repr(taken.decode()) in message
            assert "saved context" in message and "pie_context_unsave" in hint
        assert "lease" in error_of(p, f"save {hexed(b'new')} {1 << 32}")[1]  # another reason
        for line in (f"unsave {hexed(b'none')}", f"restore 1 0 {hexed(b'none')}"):
            p.do(line)
            assert failure(p.line())[:2] == ("not_found", "no saved context has the name 'none'")
        p.do("use 0")
        assert generate(p, 3) == Text([*PROMPT]).generate(3)
        assert p.end() == 0
    other.sock.close()


def test_a_saved_context_with_a_part_gone_says_so() -> None:
    first = meta_of([5] * 16384, 0, parts=2, total=16385)
    with Program(block=startup_block(max_context=20000)) as p:
        assert p.line() == "ok"
        p.do(f"restore 0 0 {hexed(b'long')}")
        imports = [c for c in p.commands() if c[0] == 44]
        p.peer.sendall(answers([0, imports[0][1], [1024, first]]))
        imports += [c for c in p.commands() if c[0] == 44]
        assert [c[4] for c in imports] == ["long", "long#1"]
        p.peer.sendall(answers([1, imports[1][1], 16, "no export has the name", "export_kvpage"]))
        name, message, hint = failure(p.line())
        assert (name, message) == ("not_found", "a part of the saved context 'long' is gone")
        assert "pie_context_unsave" in hint
        assert p.end() == 0
