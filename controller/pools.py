"""What the accelerator has: KV pages with reference counts, and hidden-state rows. And pages of
host memory to swap to.

Something freed while a step is being packed may still be read by an earlier call of that very step,
so it rests in `limbo` until `settle`, which the batcher calls before it packs the next one. Steps
run in order, so that is enough. Knows nothing of inferlets.
"""

from __future__ import annotations

from array import array


class PagePool:
    """Reference-counted pages 0 .. total - 1."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = array("i", range(total - 1, -1, -1))
        self._limbo = array("i")
        self._references = array("i", bytes(4 * total))
        self.shared_pages = 0  # with more than one reference
        self.sharings = 0  # how often one came to have another, or fewer than before, but some

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return len(self._free) + len(self._limbo)

    @property
    def available(self) -> int:
        """Pages that can be taken right now, without waiting for the next step."""
        return len(self._free)

    def take(self, count: int) -> array[int]:
        """`count` pages, one reference each. The caller has checked `available`."""
        cut = len(self._free) - count
        pages = self._free[cut:]
        del self._free[cut:]
        for page in pages:
            self._references[page] = 1
        return pages

    def retain(self, page: int) -> None:
        self._references[page] += 1
        self.shared_pages += self._references[page] == 2
        self.sharings += 1

    def release(self, page: int) -> bool:
        """True if that was its last holder."""
        self._references[page] -= 1
        if self._references[page]:
            self.shared_pages -= self._references[page] == 1
            self.sharings += 1
            return False
        self._limbo.append(page)
        return True

    def references(self, page: int) -> int:
        return self._references[page]

    def shared(self, page: int) -> bool:
        return self._references[page] > 1

    def settle(self) -> None:
        if self._limbo:
            self._free.extend(self._limbo)
            del self._limbo[:]


class RowPool:
    """Rows of the backend's hidden-state pool; one holder each."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._limbo: list[int] = []

    @property
    def free(self) -> int:
        return len(self._free) + len(self._limbo)

    @property
    def available(self) -> int:
        return len(self._free)

    def take(self) -> int:
        return self._free.pop()

    def release(self, row: int) -> None:
        self._limbo.append(row)

    def settle(self) -> None:
        if self._limbo:
            self._free += self._limbo
            self._limbo.clear()
