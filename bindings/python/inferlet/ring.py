"""The ring out: shared memory the backend writes distributions into, read here without copying.

The inferlet chooses where each distribution goes. A place is used again only when nothing refers
to it any more, neither its `Distribution` nor an array that looks into it.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

from .errors import ArgumentError, QuotaError, UnwrittenError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ALIGN = 64  # a cache line; the ABI asks for 4


class Ring:
    """`size` octets of shared memory at `fd`, and which of them are in use."""

    def __init__(self, fd: int, size: int) -> None:
        import numpy as np  # slow to import, and only distributions need it

        self.size = size
        self._memory = np.frombuffer(
            mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ), np.uint8
        )
        self.address: int = self._memory.__array_interface__["data"][0]
        self._free = [(0, size)]  # (offset, octets), ascending, never adjacent
        self.returned: list[tuple[int, int]] = []  # from finalizers, which may run at any moment

    def take(self, octets: int) -> Place:
        """A place of at least `octets`. QuotaError if none is free."""
        octets = -(-octets // _ALIGN) * _ALIGN
        self._merge_returned()
        for i, (offset, length) in enumerate(self._free):
            if length >= octets:
                rest = (offset + octets, length - octets)
                self._free[i : i + 1] = [rest] if rest[1] else []
                return Place(self, offset, octets)
        raise QuotaError(
            f"no {octets} octets are free in the ring of {self.size}: "
            "distributions that are still referred to fill it",
            "release distributions when done with them, or ask for a smaller k",
        )

    def _merge_returned(self) -> None:
        if not self.returned:
            return
        places = self._free
        while self.returned:
            places.append(self.returned.pop())
        places.sort()
        merged = [places[0]]
        for offset, length in places[1:]:
            last_offset, last_length = merged[-1]
            if last_offset + last_length == offset:
                merged[-1] = (last_offset, last_length + length)
            else:
                merged.append((offset, length))
        self._free = merged


class Place:
    """Octets of the ring that are in use as long as this object lives."""

    __slots__ = ("_ring", "octets", "offset")

    def __init__(self, ring: Ring, offset: int, octets: int) -> None:
        self._ring = ring
        self.offset = offset
        self.octets = octets

    def array(self, at: int, count: int, dtype: str) -> NDArray[Any]:
        """A read-only array into the ring, which keeps this place in use."""
        import numpy as np

        return np.asarray(_Window(self, self._ring.address + self.offset + at, count, dtype))

    def __del__(self) -> None:
        self._ring.returned.append((self.offset, self.octets))


class _Window:
    """What numpy needs to make an array of memory; the array refers to it, and it to the place."""

    def __init__(self, place: Place, address: int, count: int, dtype: str) -> None:
        self._place = place
        self.__array_interface__ = {
            "version": 3,
            "data": (address, True),
            "shape": (count,),
            "typestr": dtype,
        }


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
    def in_ring(cls, place: Place, entries: int) -> Distribution:
        """`entries` ids, then as many probabilities, at `place`."""
        return cls(place.array(0, entries, "<u4"), place.array(4 * entries, entries, "<f4"))

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
