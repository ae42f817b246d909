"""Packs one step: flat arrays, appended to as calls join, turned into a message at the end.

`array('i')` rather than lists: a page run is one memcpy, and the result goes out as bytes as it is.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

from piehost.wire.step import LATE_STEPS, MAX_SAMPLES, Step

from .tables import Late

if TYPE_CHECKING:
    from .seat import Seat

_PAGED: Final = 0
_LISTED: Final = 1


def _ints() -> array[int]:
    return array("i")


class _Group:
    """Segments of one kind, and the hidden states kept of them."""

    __slots__ = ("counts", "keep", "kv", "positions", "rows", "runs", "tokens", "writes")

    def __init__(self) -> None:
        self.tokens = _ints()
        self.positions = _ints()
        self.writes = _ints()
        self.counts = _ints()
        self.kv = _ints()
        self.runs = _ints()  # pages or slots
        self.keep = _ints()
        self.rows = _ints()


class StepBuilder:
    """The step being packed. `page_size` in slots."""

    def __init__(self, number: int, page_size: int) -> None:
        self.number = number
        self._size = page_size
        self._paged = _Group()
        self._listed = _Group()
        self._masks: list[bytes | None] = []
        self._clear_pages: set[int] = set()  # a page may be taken and freed many times
        self._clear_slots = _ints()
        self._copy_source = _ints()
        self._copy_target = _ints()
        self._hide = _ints()
        self._show = _ints()
        self._sample_rows = _ints()
        self._temperature = array("f")
        self._top_k = _ints()
        self._top_p = array("f")
        self._min_p = array("f")
        self._uniform = array("d")
        self._dists: list[tuple[int, int, int, int]] = []
        self.scratch_used = 0
        self.inputs = 0
        self.segments = 0
        self.decodes = 0  # segments of one input
        self.prefills = 0  # pieces that took of the step's budget
        self.shares: dict[Seat, int] = {}  # inputs, samples and distributions of each inferlet

    @property
    def has_work(self) -> bool:
        """False if only bookkeeping waits, which can ride with the next step."""
        return bool(
            self.segments
            or self._sample_rows
            or self._dists
            or self._copy_source
            or self._hide
            or self._show
        )

    @property
    def full(self) -> bool:
        """No room for another sample or distribution."""
        return len(self._sample_rows) + len(self._dists) >= MAX_SAMPLES

    @property
    def listed_slots(self) -> int:
        return len(self._listed.runs)

    def clear_pages(self, pages: array[int]) -> None:
        self._clear_pages.update(pages)

    def clear_slots(self, slots: array[int]) -> None:
        self._clear_slots.extend(slots)

    def copy(self, source: array[int], target: array[int]) -> None:
        self._copy_source.extend(source)
        self._copy_target.extend(target)

    def mask(self, slots: array[int], visible: bool) -> None:
        (self._show if visible else self._hide).extend(slots)

    def paged(
        self, tokens: list[int | Late], positions: list[int], pages: array[int], kv: int
    ) -> None:
        """A segment whose inputs are the last slots of a page run of `kv` slots."""
        group = self._paged
        size, count = self._size, len(tokens)
        if count == 1:
            at = kv - 1
            group.writes.append(pages[at // size] * size + at % size)
        else:
            at = kv - count
            while at < kv:
                start = pages[at // size] * size
                stop = min(kv, (at // size + 1) * size)
                group.writes.extend(range(start + at % size, start + at % size + stop - at))
                at = stop
        group.runs.extend(pages)
        self._segment(group, tokens, positions, kv)

    def listed(
        self,
        tokens: list[int | Late],
        positions: list[int],
        reads: array[int],
        writes: array[int],
        mask: bytes | None,
    ) -> None:
        """A segment over any slots; `writes` (one an input) follow `reads` in its list."""
        group = self._listed
        group.writes.extend(writes)
        group.runs.extend(reads)
        group.runs.extend(writes)
        self._masks.append(mask)
        self._segment(group, tokens, positions, len(reads) + len(writes))

    def _segment(
        self, group: _Group, tokens: list[int | Late], positions: list[int], kv: int
    ) -> None:
        for token in tokens:
            if type(token) is int:
                group.tokens.append(token)
            else:
                group.tokens.append(_late_token(token))  # type: ignore[arg-type]
        group.positions.extend(positions)
        group.counts.append(len(tokens))
        group.kv.append(kv)
        self.inputs += len(tokens)
        self.segments += 1
        self.decodes += len(tokens) == 1

    def keep(self, listed: bool, back: int, row: int) -> None:
        """Keeps the hidden state of the latest segment's input `back` places before its end."""
        group = self._listed if listed else self._paged
        group.keep.append(len(group.tokens) - 1 - back)
        group.rows.append(row)

    def sample(
        self, row: int, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float
    ) -> int:
        """Returns the sample's index in this step."""
        self._sample_rows.append(row)
        self._temperature.append(temperature)
        self._top_k.append(min(top_k, 0x7FFFFFFF))
        self._top_p.append(top_p)
        self._min_p.append(min_p)
        self._uniform.append(uniform)
        return len(self._sample_rows) - 1

    def dist(self, row: int, k: int, ring: int, offset: int) -> int:
        """Returns the distribution's index in this step."""
        self._dists.append((row, k, ring, offset))
        return len(self._dists) - 1

    def message(self) -> Step:
        paged, listed = self._paged, self._listed
        shift = len(paged.tokens)
        listed_keep = array("i", (i + shift for i in listed.keep))
        return Step(
            step=self.number,
            clear_pages=array("i", self._clear_pages).tobytes(),
            clear_slots=self._clear_slots.tobytes(),
            copy_source=self._copy_source.tobytes(),
            copy_target=self._copy_target.tobytes(),
            hide=self._hide.tobytes(),
            show=self._show.tobytes(),
            tokens=(paged.tokens + listed.tokens).tobytes(),
            positions=(paged.positions + listed.positions).tobytes(),
            write_slots=(paged.writes + listed.writes).tobytes(),
            paged_inputs=paged.counts.tobytes(),
            paged_kv=paged.kv.tobytes(),
            paged_pages=paged.runs.tobytes(),
            listed_inputs=listed.counts.tobytes(),
            listed_kv=listed.kv.tobytes(),
            listed_slots=listed.runs.tobytes(),
            listed_masks=self._masks,
            keep_inputs=(paged.keep + listed_keep).tobytes(),
            keep_rows=(paged.rows + listed.rows).tobytes(),
            sample_rows=self._sample_rows.tobytes(),
            temperature=self._temperature.tobytes(),
            top_k=self._top_k.tobytes(),
            top_p=self._top_p.tobytes(),
            min_p=self._min_p.tobytes(),
            uniform=self._uniform.tobytes(),
            dists=self._dists,
        )


def _late_token(late: Late) -> int:
    """How the step message writes an input token: its id if known, else where it will be."""
    if late.value is not None:
        return late.value
    return ~(late.step % LATE_STEPS * MAX_SAMPLES + late.index)
