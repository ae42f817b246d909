"""The scripted model's vectors: f32 numbers that say all that a hidden state, or a token, is to it.

    hidden state   1, low and high half of its checksum, the scripted token + 1 (0: none), zeros
    embedding      2, token id, zeros

So what `forward` left, or a token's own embedding, may go out and come back, and is what it was.
Any other vector is what a program made up: as an input it is a token that no text has, as a hidden
state its octets are the checksum and nothing is scripted.
"""

from __future__ import annotations

import zlib
from typing import Final, NamedTuple

import numpy as np

from .scripted_sampling import Floats

_STATE: Final = 1.0
_EMBEDDING: Final = 2.0
_HALF: Final = 1 << 16  # every number below is a float of single precision
_MAX_TOKEN: Final = 0x7FFFFFFF


class Hidden(NamedTuple):
    """All of a hidden state that the next token depends on."""

    checksum: int  # 32 bits
    says: int | None  # the scripted token


def of_state(state: Hidden, width: int) -> Floats:
    """f32 [width], width at least 4."""
    vector = np.zeros(width, np.float32)
    high, low = divmod(state.checksum, _HALF)
    vector[:4] = _STATE, low, high, 0 if state.says is None else state.says + 1
    return vector


def of_token(token: int, width: int) -> Floats:
    """f32 [width]."""
    vector = np.zeros(width, np.float32)
    vector[:2] = _EMBEDDING, token
    return vector


def to_state(vector: Floats, vocab_size: int) -> Hidden:
    kind, low, high, says = vector[:4].tolist()
    whole = all(number.is_integer() and number >= 0 for number in (low, high, says))
    if kind == _STATE and whole and max(low, high) < _HALF and says <= vocab_size:
        state = Hidden(int(high) * _HALF + int(low), int(says) - 1 if says else None)
        if np.array_equal(of_state(state, len(vector)), vector):
            return state
    return Hidden(zlib.crc32(vector.tobytes()), None)


def to_token(vector: Floats, vocab_size: int) -> int:
    """A token id, or for other vectors a number from `vocab_size` on, below 2**31."""
    kind, token = vector[:2].tolist()
    if (
        kind == _EMBEDDING
        and 0 <= token < vocab_size
        and np.array_equal(of_token(int(token), len(vector)), vector)
    ):
        return int(token)
    return vocab_size + zlib.crc32(vector.tobytes()) % (_MAX_TOKEN - vocab_size)
