"""Sampling parameters, checked before they are sent, and late-bound tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, SupportsFloat, SupportsIndex, TypedDict

from .abi import MAX_BIASES, MAX_STOP_TOKENS
from .checks import U32_MAX, integer, number, out_of_range, wrong_type
from .distribution import Distribution
from .errors import ArgumentError, MaskError
from .future import Answer, same
from .ring import Place, Window
from .spans import TokenHandle

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .connection import Connection


TOKENS_A_COMMAND = 4096  # at most 10 octets each, in a frame of 64 Ki
_MAX_TOKEN = 0x7FFFFFFF


class Sampling(TypedDict, total=False):
    """How to draw a token (`docs/abi.md`, sample); what is left out is off.

    First the penalties, then the bias. Then logits are divided by the temperature; then `top_k`
    keeps the k most probable, `min_p` those with at least min_p times the top probability, `top_p`
    the fewest that reach top_p. The penalties look at a `History`.
    """

    temperature: float  # 0 takes the most probable token, whatever top_k, top_p and min_p say
    top_k: int
    top_p: float  # in (0, 1]
    min_p: float  # in [0, 1]
    seed: int | None  # 0 to 2**64 - 1: the same draws every time; None: random
    bias: Mapping[int, float]  # added to the logits of these tokens, at most 1,024 of them
    repetition_penalty: float  # above 0; 1 is off, more makes repeating less likely
    presence_penalty: float  # -1e6 to 1e6; subtracted once for a token generated before
    frequency_penalty: float  # -1e6 to 1e6; subtracted for each time it was


_OFF: Sampling = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "seed": None,
    "bias": {},
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def check_sampling(options: Sampling) -> Sampling:
    """`options` with wire types, and what they leave out. ArgumentError if one is out of its range,
    or unknown."""
    if not options:
        return _OFF
    checked = _OFF.copy()
    for name, value in options.items():
        if value is _OFF.get(name, _CHECKS):
            continue  # as most are
        check = _CHECKS.get(name)
        if check is None:
            raise ArgumentError(f"there is no parameter {name!r}", "use " + ", ".join(_CHECKS))
        checked[name] = check(value)  # type: ignore[literal-required]
    return checked


def penalizes(sampling: Sampling) -> bool:
    """True if checked `sampling` needs a history."""
    return (
        sampling["repetition_penalty"] != 1.0
        or sampling["presence_penalty"] != 0.0
        or sampling["frequency_penalty"] != 0.0
    )


def _ranged(
    name: str, valid: str, holds: Callable[[float], bool]
) -> Callable[[SupportsFloat], float]:
    """A check that gives a number for which `holds`, which is false for NaN."""

    def check(value: SupportsFloat) -> float:
        checked = value if type(value) is float else number(name, value, valid)
        if not holds(checked):
            raise out_of_range(name, checked, valid)
        return checked

    return check


def _check_top_k(value: SupportsIndex) -> int:
    return integer("top_k", value, U32_MAX, "0 (off) or more")


def _check_seed(value: SupportsIndex | None) -> int | None:
    return None if value is None else integer("seed", value, (1 << 64) - 1, "0 to 2**64 - 1")


def _check_bias(bias: Mapping[int, float]) -> Mapping[int, float]:
    valid = "a dict of token id to number"
    if not isinstance(bias, Mapping):
        raise wrong_type("bias", bias, valid)
    if len(bias) > MAX_BIASES:
        raise out_of_range("the number of biases", len(bias), f"at most {MAX_BIASES:,}, or a mask")
    checked = {}
    for token, value in bias.items():
        added = number(f"the bias of token {token}", value, valid)
        if math.isnan(added):
            raise out_of_range(f"the bias of token {token}", added, "a number")
        checked[integer("a token with a bias", token, U32_MAX, "a token id")] = added
    return checked


_PENALTY = "-1e6 to 1e6; 0 is off"
_CHECKS: dict[str, Callable[[Any], Any]] = {
    "temperature": _ranged("temperature", "0 (greedy) to 1e6", lambda v: 0 <= v <= 1e6),
    "top_k": _check_top_k,
    "top_p": _ranged("top_p", "above 0, to 1 (off)", lambda v: 0 < v <= 1),
    "min_p": _ranged("min_p", "0 (off) to 1", lambda v: 0 <= v <= 1),
    "seed": _check_seed,
    "bias": _check_bias,
    "repetition_penalty": _ranged(
        "repetition_penalty", "above 0, to 1e6; 1 is off", lambda v: 0 < v <= 1e6
    ),
    "presence_penalty": _ranged("presence_penalty", _PENALTY, lambda v: -1e6 <= v <= 1e6),
    "frequency_penalty": _ranged("frequency_penalty", _PENALTY, lambda v: -1e6 <= v <= 1e6),
}


def _is_listing(values: object) -> bool:
    """True if `values` can be gone through, and is no text."""
    return type(values) in (list, tuple) or (
        isinstance(values, Iterable) and not isinstance(values, str | bytes)
    )


def check_stop(stop: Iterable[SupportsIndex]) -> list[int]:
    """`stop` as sent. ArgumentError if there are too many or one is no token id."""
    if not _is_listing(stop):
        raise wrong_type("stop", stop, "a list of token ids")
    tokens = [
        token
        if type(token) is int and 0 <= token <= U32_MAX
        else integer("a stop token", token, U32_MAX, "a token id")
        for token in stop
    ]
    if len(tokens) > MAX_STOP_TOKENS:
        raise out_of_range("the number of stop tokens", len(tokens), f"0 to {MAX_STOP_TOKENS}")
    return tokens


def pack_token_mask(mask: NDArray[np.bool_] | bytes, vocab_size: int) -> bytes:
    """A bit for each token, least significant first. MaskError if `mask` is not bool of shape
    (vocab_size,), or such bits of that length, or allows no token."""
    size = -(-vocab_size // 8)
    if isinstance(mask, bytes | bytearray | memoryview):
        packed = bytes(mask)
        if len(packed) != size:
            raise MaskError(f"the mask has {len(packed)} octets", f"give {size}: a bit for a token")
    else:
        import numpy as np  # only masks need it here, and it is slow to import

        array = np.asarray(mask)
        if array.dtype != np.bool_ or array.shape != (vocab_size,):
            raise MaskError(
                f"the mask is {array.dtype} of shape {array.shape}",
                f"give bool of shape ({vocab_size},): True for the tokens allowed",
            )
        packed = np.packbits(array, bitorder="little").tobytes()
    if packed.count(0) == size:
        raise MaskError("the mask allows no token", "allow at least one")
    return packed


class Token(Answer["int | None"], public=True):
    """A sampled token: the accelerator knows it first, this future when its answer comes.

    `embed_txt` takes it before that. Its value is None if an earlier stop dropped the sample.
    Once it is answered, `logprob` is the natural logarithm of its probability by the model's own
    softmax, if `logprobs` or a `k` was asked for, and `distribution` the `k` most probable tokens
    of it; else they are None.
    """

    __slots__ = ("_mask", "_top", "distribution", "handle", "logprob")

    def __init__(
        self,
        connection: Connection,
        handle: TokenHandle,
        mask: Place | None = None,
        top: Window | None = None,
    ) -> None:
        """`mask` and `top` are where its command has the backend read and write."""
        super().__init__(connection, same)
        self.handle = handle
        self.logprob: float | None = None
        self.distribution: Distribution | None = None
        self._mask = mask
        self._top = top

    def resolve(self, value: Any) -> None:
        if isinstance(value, list):
            value, self.logprob, entries = value
            if self._top is not None:
                self.distribution = Distribution.in_ring(self._top, entries)
        super().resolve(value)

    def _settle(self) -> None:
        self._mask = self._top = None
        super()._settle()


def token_refs(tokens: Iterable[SupportsIndex | Token]) -> list[int]:
    """`tokens` as sent: ids, and ~handle of late-bound tokens. ArgumentError if one is neither."""
    if not _is_listing(tokens):
        raise wrong_type("tokens", tokens, "a list of token ids; tokenize gives that of a text")
    valid = "0 to the vocabulary's size - 1"
    return [
        ~token.handle.number
        if isinstance(token, Token)
        else integer("the token id", token, _MAX_TOKEN, valid)
        for token in tokens
    ]
