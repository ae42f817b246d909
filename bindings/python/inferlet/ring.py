"""The rings: shared memory the backend writes distributions and hidden states into (ring out), read
here without copying, and reads token masks and vectors from (ring in).

The inferlet chooses where each goes. A place is used again only when nothing refers to it any
more: of ring out, neither its `Distribution` nor an array that looks into it; of ring in, once the
command that names it is answered.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

from .errors import QuotaError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ALIGN = 64  # a cache line; the ABI asks for 4


class Ring:
    """`size` octets, and which of them are in use."""

    def __init__(self, size: int, name: str, hint: str) -> None:
        self.size = size
        self._name = name
        self._hint = hint  # what to try when it is full
        self._free = [(0, size)]  # (offset, octets), ascending, never adjacent
        self.returned: list[tuple[int, int]] = []  # from finalizers, which may run at any moment

    def take(self, octets: int) -> tuple[int, int]:
        """(offset, length) of a free place of at least `octets`. QuotaError if there is none."""
        octets = -(-octets // _ALIGN) * _ALIGN
        self._merge_returned()
        for i, (offset, length) in enumerate(self._free):
            if length >= octets:
                rest = (offset + octets, length - octets)
                self._free[i : i + 1] = [rest] if rest[1] else []
                return offset, octets
        raise QuotaError(f"no {octets} octets are free in {self._name} of {self.size}", self._hint)

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


class RingOut(Ring):
    """The ring at `fd` that the backend writes, mapped read-only."""

    def __init__(self, fd: int, size: int) -> None:
        import numpy as np  # slow to import, and only what reads the ring needs it

        super().__init__(
            size,
            "ring out",
            "release distributions and vectors when done with them, or ask for less",
        )
        self._memory = np.frombuffer(
            mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ), np.uint8
        )
        self.address: int = self._memory.__array_interface__["data"][0]

    def place(self, octets: int) -> Window:
        """A place for the backend to write. QuotaError if no such is free."""
        return Window(self, octets)


class RingIn(Ring):
    """The ring at `fd` that the backend reads, mapped for writing."""

    def __init__(self, fd: int, size: int) -> None:
        super().__init__(
            size, "ring in", "wait for the answers of earlier samples or vectors, or send fewer"
        )
        self._memory = mmap.mmap(
            fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )

    def put(self, data: bytes | memoryview) -> Place:
        """A place that holds `data`. QuotaError if no such is free."""
        place = Place(self, len(data))
        self._memory[place.offset : place.offset + len(data)] = data
        return place


class Place:
    """Octets of a ring that are in use as long as this object lives."""

    __slots__ = ("_ring", "octets", "offset")

    def __init__(self, ring: Ring, octets: int) -> None:
        """QuotaError if no such place is free."""
        self.offset, self.octets = ring.take(octets)
        self._ring = ring

    def __del__(self) -> None:
        if hasattr(self, "_ring"):  # not there if none was free
            self._ring.returned.append((self.offset, self.octets))


class Window(Place):
    """A place of ring out to look into."""

    __slots__ = ("_address",)

    def __init__(self, ring: RingOut, octets: int) -> None:
        super().__init__(ring, octets)
        self._address = ring.address + self.offset

    def array(self, at: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """A read-only array of what lies `at` octets into it, which keeps this place in use."""
        import numpy as np

        return np.asarray(_Interface(self, self._address + at, shape, dtype))


class _Interface:
    """What numpy needs to make an array of memory; the array refers to it, and it to the place."""

    def __init__(self, window: Window, address: int, shape: tuple[int, ...], dtype: str) -> None:
        self._window = window
        self.__array_interface__ = {
            "version": 3,
            "data": (address, True),
            "shape": shape,
            "typestr": dtype,
        }
