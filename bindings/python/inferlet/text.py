"""The vocabulary table, and text from tokens: whole (`detokenize`) or as it comes."""

from __future__ import annotations

import codecs
import struct
from collections.abc import Iterable
from mmap import mmap

from .abi import VOCAB_MAGIC, VOCAB_SPECIAL
from .errors import ArgumentError, InferletError

_HEADER_BYTES = 12


class Vocabulary:
    """Token texts out of a table of `docs/abi.md` section 4, looked up where it lies."""

    def __init__(self, table: bytes | mmap) -> None:
        """InferletError if `table` is no vocabulary table of version 1."""
        view = memoryview(table)
        if len(view) < _HEADER_BYTES or bytes(view[:4]) != VOCAB_MAGIC:
            raise InferletError("the vocabulary table is not one", "run the same piehost version")
        version, count = struct.unpack_from("<II", view, 4)
        if version != 1:
            raise InferletError(
                f"the vocabulary table has version {version}, this SDK reads 1",
                "install the inferlet package of the same version as piehost",
            )
        flags_at = _HEADER_BYTES + 4 * (count + 1)
        self._count: int = count
        self._starts = view[_HEADER_BYTES:flags_at].cast("I")
        self._flags = view[flags_at : flags_at + count]
        self._text = view[flags_at + count :]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, token: int) -> bytes:
        """The octets of `token`, control tokens included. ArgumentError if there is none."""
        if not 0 <= token < self._count:
            raise ArgumentError(
                f"token {token} is not in the vocabulary of {self._count}",
                f"use ids from 0 to {self._count - 1}",
            )
        return bytes(self._text[self._starts[token] : self._starts[token + 1]])

    def is_control(self, token: int) -> bool:
        """True if `token` has no text of its own, such as an end of sequence."""
        return bool(self._flags[token] & VOCAB_SPECIAL)

    def octets(self, tokens: Iterable[int]) -> bytes:
        """The text of `tokens`, control tokens left out; it may end inside a character."""
        return b"".join([piece for t in tokens if (piece := self[t]) and not self.is_control(t)])

    def detokenize(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; octets that are no UTF-8 become U+FFFD."""
        return self.octets(tokens).decode("utf-8", "replace")


class StreamDecoder:
    """Text of tokens as they come; a character split over tokens is held back until it is whole.

    What `feed` returned in all, then `finish`, is what `detokenize` gives for all the tokens.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, *tokens: int) -> str:
        """The text that `tokens` complete. ArgumentError if one is not in the vocabulary."""
        return self._decoder.decode(self._vocabulary.octets(tokens))

    def finish(self) -> str:
        """What is left, if the last character never became whole."""
        return self._decoder.decode(b"", final=True)

    def reset(self) -> None:
        """Forgets what is held back."""
        self._decoder.reset()
