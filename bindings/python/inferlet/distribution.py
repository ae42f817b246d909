"""The most probable next tokens, as the backend wrote them into ring out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import ArgumentError, UnwrittenError
from .ring import Window

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Distribution:
    """The most probable next tokens (Pie, SOSP'25, `get_next_dist`).

    `ids` (u32) and `probs` (f32) have the same length, most probable first; both are read-only
    views of the ring. Length 0: an earlier stop dropped the step.
    """

    __slots__ = ("_ids", "_probs")

    def __init__(self, ids: NDArray[np.uint32], probs: NDArray[np.float32]) -> None:
        self._ids: NDArray[np.uint32] | None = ids
        self._probs: NDArray[np.float32] | None = probs

    @classmethod
    def in_ring(cls, place: Window, entries: int) -> Distribution:
        """`entries` ids, then as many probabilities, at `place`."""
        return cls(place.array(0, (entries,), "<u4"), place.array(4 * entries, (entries,), "<f4"))

    @property
    def ids(self) -> NDArray[np.uint32]:
        """Token ids, u32, most probable first."""
        if self._ids is None:
            raise _released()
        return self._ids

    @property
    def probs(self) -> NDArray[np.float32]:
        """Probabilities of `ids`, f32, from the softmax over the whole vocabulary."""
        if self._probs is None:
            raise _released()
        return self._probs

    def __len__(self) -> int:
        return len(self.ids)

    def argmax(self) -> int:
        """The most probable token. UnwrittenError if an earlier stop dropped the step."""
        if not len(self):
            raise UnwrittenError(
                "there is no distribution: a stop earlier in the chain dropped this step",
                "look at the sampled tokens before asking for distributions after a stop",
            )
        return int(self.ids[0])

    def copy(self) -> Distribution:
        """The same distribution outside the ring."""
        return Distribution(self.ids.copy(), self.probs.copy())

    def release(self) -> None:
        """Gives the ring its place back now. Arrays taken from `ids` or `probs` keep it."""
        self._ids = self._probs = None


def _released() -> ArgumentError:
    return ArgumentError("the distribution was released", "copy() it before release()")
