"""The vocabulary table: joining pieces gives back the text, for both kinds of tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inferlet.abi import read_vocab_table
from tokenizers import Tokenizer

from piehost.gpu_backend.vocabulary import Vocabulary, load_vocabulary

from .checkpoints import byte_level_tokenizer, sentencepiece_tokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("byte_level")
    byte_level_tokenizer().save_pretrained(folder)
    return load_vocabulary(folder, 400)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece_tokenizer().save_pretrained(folder)
    return load_vocabulary(folder, 300)


def detokenize(vocabulary: Vocabulary, ids: list[int]) -> bytes:
    pieces, special = read_vocab_table(vocabulary.table)
    return b"".join(pieces[i] for i in ids if not special[i])


def encode(vocabulary: Vocabulary, text: str) -> list[int]:
    ids: list[int] = Tokenizer.from_str(vocabulary.tokenizer_json.decode()).encode(text).ids
    return ids


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
def test_byte_level_pieces_join_to_the_text(byte_level: Vocabulary, text: str) -> None:
    assert detokenize(byte_level, encode(byte_level, text)) == text.encode()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(min_size=1, max_size=60).filter(lambda text: "\u2581" not in text))
def test_sentencepiece_pieces_join_to_the_text(sentencepiece: Vocabulary, text: str) -> None:
    joined = detokenize(sentencepiece, encode(sentencepiece, text))
    assert joined == b" " + text.encode()  # such tokenizers put a space in front


def test_control_tokens_and_ids_without_a_token_have_no_text(
    byte_level: Vocabulary, sentencepiece: Vocabulary
) -> None:
    for vocabulary, size, used in ((byte_level, 400, 330), (sentencepiece, 300, 266)):
        pieces, special = read_vocab_table(vocabulary.table)
        assert len(pieces) == size
        for i in (0, 1, 2, *range(used, size)):
            assert (pieces[i], special[i]) == (b"", True)
        assert not any(special[4:used])
        assert all(pieces[4:used])


def test_single_octets_are_octets(sentencepiece: Vocabulary) -> None:
    pieces, _ = read_vocab_table(sentencepiece.table)
    assert [pieces[4 + i] for i in range(256)] == [bytes((i,)) for i in range(256)]


def test_a_model_with_fewer_ids_than_the_tokenizer_cuts_the_table(tmp_path: Path) -> None:
    byte_level_tokenizer().save_pretrained(tmp_path)
    pieces, _ = read_vocab_table(load_vocabulary(tmp_path, 100).table)
    assert len(pieces) == 100


def test_added_words_that_are_no_control_tokens_keep_their_text(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<think>", "caf\u00e9 !"])
    tokenizer.save_pretrained(tmp_path)
    vocabulary = load_vocabulary(tmp_path, 400)
    text = "a <think> caf\u00e9 ! b"
    assert detokenize(vocabulary, encode(vocabulary, text)) == text.encode()


def test_truncation_and_padding_stay_behind(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "The capital of France is Paris."
    vocabulary = load_vocabulary(tmp_path, 400)
    assert detokenize(vocabulary, encode(vocabulary, text)) == text.encode()


def test_the_chat_template_comes_along(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path)
    assert load_vocabulary(tmp_path, 400).chat_template == "{{ messages[0].content }}"
