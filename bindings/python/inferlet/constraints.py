"""Constraints: functions that say which tokens may come next, and two that come ready-made.

    context.generate(constraint=choice(model, [" yes", " no"]))

A constraint is asked before each token, with the tokens generated so far, and gives what may come
next: token ids, a bool array of shape (vocab_size,), such bits packed (least significant first),
None for all tokens, or `END`, which ends the generation there. It should allow an end token where
the text may end. With a sampler it decides first: the sampler gets what is allowed of the `k` most
probable tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, cast

from .checks import integer, wrong_type
from .distribution import Distribution
from .errors import ArgumentError, MaskError
from .sampling import pack_token_mask

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .model import Model
    from .text import Vocabulary


class _End(Enum):
    END = "END"


END: Final = _End.END
"""What a constraint gives to end the generation."""

Allowed: TypeAlias = "NDArray[np.bool_] | bytes | Iterable[int] | Literal[_End.END] | None"
Constraint: TypeAlias = "Callable[[list[int]], Allowed]"


def packed_mask(allowed: Allowed, vocab_size: int, generated: int) -> bytes | None:
    """The mask of what a constraint allows after `generated` tokens, None for all. MaskError if it
    allows none, or is of another size; ArgumentError if it is nothing a constraint may give."""
    if allowed is None:
        return None
    if isinstance(allowed, str) or not isinstance(allowed, Iterable):
        raise wrong_type("what the constraint gave", allowed, "ids, a bool array, bytes or None")
    if isinstance(allowed, bytes | bytearray | memoryview):
        octets = bytes(allowed)
    elif str(getattr(allowed, "dtype", "")) == "bool":
        array = cast("NDArray[np.bool_]", allowed)
        octets = pack_token_mask(array, vocab_size) if array.any() else b""
    else:
        octets = _bits(allowed, vocab_size)
    if not any(octets):
        raise MaskError(
            f"the constraint allows no token after {generated} generated ones",
            "allow at least one, an end token say, or return inferlet.END to end there",
        )
    return pack_token_mask(octets, vocab_size)


def restricted(distribution: Distribution, mask: bytes) -> Distribution:
    """What `mask` leaves of `distribution`, its probabilities adding up to 1; a copy. MaskError if
    that is nothing."""
    import numpy as np  # slow to import, and few programs need it

    ids, octets = distribution.ids, np.frombuffer(mask, np.uint8)
    kept = (octets[ids >> 3] >> (ids & 7) & 1) == 1
    ids, probs = ids[kept], distribution.probs[kept]
    if not len(ids):
        raise MaskError(
            f"the constraint allows none of the {len(distribution)} most probable tokens, which "
            "are all that the sampler gets",
            "give a larger k, or no sampler: then all of the vocabulary is looked at",
        )
    total = probs.sum(dtype=float)
    even = np.full(len(ids), 1 / len(ids))  # where f32 cannot tell them from 0
    return Distribution(ids, (probs / total if total else even).astype(np.float32))


def _bits(tokens: Iterable[int], vocab_size: int) -> bytes:
    """A bit for each token, set for `tokens`. ArgumentError if one is not in the vocabulary."""
    octets, valid = bytearray(-(-vocab_size // 8)), f"ids from 0 to {vocab_size - 1}"
    for given in tokens:
        token = integer("a token that the constraint allows", given, vocab_size - 1, valid)
        octets[token >> 3] |= 1 << (token & 7)
    return bytes(octets)


class OctetAutomaton:
    """A constraint on the octets of the text generated: they must lead from state to state.

    A token is allowed if all of its octets are, so neither tokens that end inside a character nor
    those that reach over several need any care. Control tokens are not, but for `stop` in a state
    where the text may end; where it can only end, the generation does.
    """

    def __init__(
        self,
        model: Model,
        edges: Sequence[dict[int, int]],
        final: Iterable[int],
        stop: Iterable[int] | None = None,
    ) -> None:
        """`edges[s][octet]` is the state after `octet` in state `s`; it begins in state 0. In the
        states of `final` the text may end. `stop`: the tokens that end it; None: the model's."""
        self._vocabulary = model.runtime.vocabulary
        self._edges = edges
        self._final = frozenset(final)
        self._stop = list(model.eos_tokens if stop is None else stop)
        self._masks: dict[int, bytes] = {}
        if not self._stop and any(edges[state] for state in self._final):
            raise ArgumentError(
                "the text may end where it may also go on, and no token says that it ends",
                "give stop=, and the same to generate",
            )

    def __call__(self, tokens: list[int]) -> bytes | Literal[_End.END]:
        """What may come after `tokens`. ArgumentError if they were not allowed themselves."""
        state: int | None = self._after(0, self._vocabulary.octets(tokens))
        if state is None:
            raise ArgumentError(
                "the tokens generated so far are not what the constraint allowed",
                "use one constraint for one generation, from its start",
            )
        if state in self._final and not self._edges[state]:
            return END
        if state not in self._masks:
            self._masks[state] = self._mask(state)
        return self._masks[state]

    def _after(self, state: int, octets: bytes) -> int | None:
        """The state after `octets`, None if they are not allowed."""
        edges = self._edges
        for octet in octets:
            if (following := edges[state].get(octet)) is None:
                return None
            state = following
        return state

    def _mask(self, state: int) -> bytes:
        allowed = [
            token
            for octet in self._edges[state]
            for token, octets in _by_first_octet(self._vocabulary)[octet]
            if self._after(state, octets) is not None
        ]
        ends = self._stop if state in self._final else []
        return _bits(allowed + ends, len(self._vocabulary))


def choice(
    model: Model, strings: Iterable[str], stop: Iterable[int] | None = None
) -> OctetAutomaton:
    """A constraint: exactly one of `strings`, however they fall into tokens. Most tokenizers put
    a space before a word into its token, so after a text without one at its end give " yes", not
    "yes". The generation ends by itself, or with one of `stop` (None: the model's end tokens)
    where one string begins with another. ArgumentError if there is none, or an empty one.
    """
    if isinstance(strings, str | bytes) or not isinstance(strings, Iterable):
        raise wrong_type("strings", strings, "a list of texts")
    edges: list[dict[int, int]] = [{}]
    final = set()
    for text in strings:
        if not isinstance(text, str) or not text:
            raise wrong_type("a choice", text, "a text that is not empty")
        state = 0
        for octet in text.encode():
            state = _edge(edges, state, octet)
        final.add(state)
    if not final:
        raise ArgumentError("there is nothing to choose from", "give at least one text")
    return OctetAutomaton(model, edges, final, stop)


def characters(
    model: Model, allowed: str, least: int = 1, stop: Iterable[int] | None = None
) -> OctetAutomaton:
    """A constraint: `least` or more characters, all of them from `allowed`, such as
    `string.digits`; ended by one of `stop` (None: the model's end tokens), or by `max_tokens`.
    ArgumentError if `allowed` is empty."""
    if not isinstance(allowed, str) or not allowed:
        raise wrong_type("allowed", allowed, "a text of the characters allowed")
    count = integer("least", least, 1 << 16, "0 to 65,536")
    edges: list[dict[int, int]] = [{} for _ in range(count + 1)]  # by how many there are
    for state in range(count + 1):
        for character in set(allowed):
            *lead, last = character.encode()
            at = state
            for octet in lead:
                at = _edge(edges, at, octet)
            edges[at][last] = min(state + 1, count)
    return OctetAutomaton(model, edges, [count], stop)


def _edge(edges: list[dict[int, int]], state: int, octet: int) -> int:
    """The state that `octet` leads to, made if there is none."""
    if octet not in edges[state]:
        edges[state][octet] = len(edges)
        edges.append({})
    return edges[state][octet]


_indexes: weakref.WeakKeyDictionary[Vocabulary, list[list[tuple[int, bytes]]]] = (
    weakref.WeakKeyDictionary()
)


def _by_first_octet(vocabulary: Vocabulary) -> list[list[tuple[int, bytes]]]:
    """The tokens that begin with each octet, with their octets; made once."""
    if vocabulary not in _indexes:
        index: list[list[tuple[int, bytes]]] = [[] for _ in range(256)]
        for token in range(len(vocabulary)):
            octets = vocabulary[token]
            if octets and not vocabulary.is_control(token):
                index[octets[0]].append((token, octets))
        _indexes[vocabulary] = index
    return _indexes[vocabulary]
