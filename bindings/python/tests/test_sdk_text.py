"""Text from tokens, whole and as it comes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferlet import ArgumentError, InferletError, StreamDecoder, Vocabulary, abi
from scripted import Host
from scripted_device import BOS, EOS


def decode(pieces: list[bytes], special: list[bool]) -> tuple[list[str], str]:
    """(what each token gives, then the end; the text of all at once)"""
    vocabulary = Vocabulary(abi.build_vocab_table(pieces, special))
    decoder = StreamDecoder(vocabulary)
    parts = [decoder.feed(token) for token in range(len(pieces))]
    return [*parts, decoder.finish()], vocabulary.detokenize(range(len(pieces)))


@given(st.text(), st.data())
def test_any_split_of_any_text_comes_out_whole(text: str, data: st.DataObject) -> None:
    octets = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(octets)), max_size=20)))
    ends = [0, *cuts, len(octets)]
    pieces = [octets[a:b] for a, b in pairwise(ends)]
    parts, whole = decode(pieces, [False] * len(pieces))
    assert "".join(parts) == whole == text
    assert parts[-1] == ""
    read = 0
    for part, end in zip(parts, ends[1:], strict=False):  # as much as is whole, no more
        read += len(part.encode())
        assert end - 3 <= read <= end


@given(st.lists(st.tuples(st.binary(max_size=5), st.booleans()), max_size=20))
def test_octets_that_are_no_utf8_are_replaced_and_control_tokens_left_out(
    tokens: list[tuple[bytes, bool]],
) -> None:
    parts, whole = decode([p for p, _ in tokens], [s for _, s in tokens])
    expected = b"".join(p for p, s in tokens if not s).decode("utf-8", "replace")
    assert "".join(parts) == whole == expected


def test_the_model_s_own_text(host: Host) -> None:
    model = host.model
    assert model.tokenize("h\u00e9").result() == [BOS, 104, 195, 169]
    assert model.tokenize("h", special=False).result() == [104]
    assert model.detokenize([BOS, 104, 195, 169, EOS]) == "h\u00e9"
    assert model.get_vocabs()[BOS] == b"<s>" and len(model.get_vocabs()) == model.vocab_size
    decoder = model.stream_decoder()
    assert [decoder.feed(t) for t in (104, 195, EOS, 169)] == ["h", "", "", "\u00e9"]
    with pytest.raises(ArgumentError, match="vocabulary"):
        model.detokenize([100000])


@pytest.mark.parametrize("table", [b"", b"PIEV", b"XIEV" + bytes(8), b"PIEV\x02" + bytes(11)])
def test_what_is_no_table_is_refused(table: bytes) -> None:
    with pytest.raises(InferletError):
        Vocabulary(table)
