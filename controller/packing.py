"""Packs one step: flat arrays, appended to as calls join, turned into a message at the end.

`array('i')` rather than lists: a page run is one memcpy, and the result goes out as bytes as it is.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

from piehost.wire.step import LATE_STEPS, MAX_SAMPLES, Step

from .tables import Hidden, History, Late

if TYPE_CHECKING:
    from .seat import Seat

Input = int | Late | Hidden  # a token id, a late token, a vector

# 32-bit numbers that samples bring along (`StepBuilder.shaping`), 2 MiB of message; a first one's
# always
_MOST_SHAPING: Final = 1 << 19
# What moves between steps and rings in one step, a first call's always: entries of distributions
# (8 octets each), and vectors
_MOST_ENTRIES: Final = 1 << 20
_MOST_VECTORS: Final = 4096


def _packed(values: list[int]) -> bytes:
    return array("i", values).tobytes()


class _Group:
    """Segments of one kind, and the hidden states kept of them."""

    __slots__ = (
        "counts",
        "keep",
        "kv",
        "positions",
        "rows",
        "runs",
        "tokens",
        "vector_rows",
        "vectors",
        "writes",
    )

    def __init__(self) -> None:
        # lists where most steps have nothing: an array costs ten times as much to make
        self.tokens = array("i")
        self.positions = array("i")
        self.writes = array("i")
        self.counts = array("i")
        self.kv = array("i")
        self.runs = array("i")  # pages or slots
        self.keep = array("i")
        self.rows = array("i")
        self.vectors: list[int] = []  # inputs that are vectors
        self.vector_rows: list[int] = []

    def followed_by(self, other: _Group) -> _Group:
        """The inputs of both, and what is kept of them."""
        both, shift = _Group(), len(self.tokens)
        both.tokens = self.tokens + other.tokens
        both.positions = self.positions + other.positions
        both.writes = self.writes + other.writes
        both.keep = self.keep + array("i", [i + shift for i in other.keep])
        both.rows = self.rows + other.rows
        both.vectors = self.vectors + [i + shift for i in other.vectors]
        both.vector_rows = self.vector_rows + other.vector_rows
        return both


_NO_SEGMENTS: Final = _Group()


class StepBuilder:
    """The step being packed. `page_size` in slots; `room` for inputs of forwards, of which
    `prefill_room` for those of prompts."""

    def __init__(self, number: int, page_size: int, room: int, prefill_room: int) -> None:
        self.number = number
        self._size = page_size
        self.room = room
        self.prefill_room = prefill_room
        self._paged = _Group()
        self._listed = _NO_SEGMENTS
        self._listed_masks: list[bytes | None] = []
        self._clear_pages: set[int] = set()  # a page may be taken and freed many times
        self.lingering: dict[int, int] = {}  # pages read and let go -> stage of the latest read
        self._clear_slots = array("i")
        self._copy_source = array("i")
        self._copy_target = array("i")
        self._swap_out: dict[int, int] = {}  # pages -> places
        self._swap_in: dict[int, int] = {}  # places -> pages
        self._hide = array("i")
        self._show = array("i")
        self._sample_rows = array("i")
        self._temperature = array("f")
        self._top_k = array("i")
        self._top_p = array("f")
        self._min_p = array("f")
        self._uniform = array("d")
        self._dists: list[tuple[int, int, int, int]] = []
        self._entries = 0  # of the distributions
        self._vectors: list[tuple[int, int, int]] = []
        self._vector_into: list[int] = []
        self._embeds: list[tuple[int, int, int]] = []
        self._embed_from: list[int] = []
        self._masks: list[tuple[int, int, int]] = []
        self._bias_samples: list[int] = []
        self._bias_tokens: list[int] = []
        self._bias_values: list[float] = []
        self._penalties: list[tuple[int, float, float, float, int, int]] = []
        self._history = array("i")
        self._logprobs: list[int] = []
        self.scratch_used = 0
        self.inputs = 0
        self.segments = 0
        self.decodes = 0  # segments of one input
        self.shares: dict[Seat, int] = {}  # what `Run.take_share` counts

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
            or self._vectors
            or self._embeds
            or self._swap_out
            or self._swap_in
        )

    @property
    def swaps(self) -> bool:
        """Pages go to host memory or come back."""
        return bool(self._swap_out or self._swap_in)

    @property
    def full(self) -> bool:
        """No room for another sample or distribution."""
        return len(self._sample_rows) + len(self._dists) >= MAX_SAMPLES

    @property
    def listed_slots(self) -> int:
        return len(self._listed.runs)

    def has_shaping(self, numbers: int) -> bool:
        """True if there is room for so many more 32-bit numbers of samples' bias and history."""
        held = 3 * len(self._bias_tokens) + len(self._history)
        return not (held and numbers) or held + numbers <= _MOST_SHAPING

    def has_entries(self, count: int) -> bool:
        """True if there is room for a distribution of so many entries."""
        return not self._entries or self._entries + count <= _MOST_ENTRIES

    def has_vectors(self, count: int) -> bool:
        """True if there is room for so many vectors, in or out."""
        held = len(self._vector_into) + len(self._embed_from)
        return not held or held + count <= _MOST_VECTORS

    def clear_pages(self, pages: array[int]) -> None:
        self._clear_pages.update(pages)

    def clear_slots(self, slots: array[int]) -> None:
        self._clear_slots.extend(slots)

    def copy(self, source: array[int], target: array[int]) -> None:
        self._copy_source.extend(source)
        self._copy_target.extend(target)

    def swap_out(self, places: dict[int, int]) -> None:
        """Pages go to places of host memory; neither is used otherwise in this step."""
        self._swap_out.update(places)

    def swap_in(self, pages: dict[int, int]) -> None:
        """What is in places of host memory goes to pages, which earlier parts of this step do not
        use."""
        self._swap_in.update(pages)

    def mask(self, slots: array[int], visible: bool) -> None:
        (self._show if visible else self._hide).extend(slots)

    def paged(self, tokens: list[Input], positions: list[int], pages: array[int], kv: int) -> None:
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
        tokens: list[Input],
        positions: list[int],
        reads: array[int],
        writes: array[int],
        mask: bytes | None,
    ) -> None:
        """A segment over any slots; `writes` (one an input) follow `reads` in its list."""
        if self._listed is _NO_SEGMENTS:
            self._listed = _Group()
        group = self._listed
        group.writes.extend(writes)
        group.runs.extend(reads)
        group.runs.extend(writes)
        self._listed_masks.append(mask)
        self._segment(group, tokens, positions, len(reads) + len(writes))

    def _segment(self, group: _Group, tokens: list[Input], positions: list[int], kv: int) -> None:
        for token in tokens:
            if type(token) is int:
                group.tokens.append(token)
            elif type(token) is Late:
                group.tokens.append(late_token(token))
            else:
                group.vectors.append(len(group.tokens))
                group.vector_rows.append(token.row)  # type: ignore[union-attr]
                group.tokens.append(0)
        group.positions.extend(positions)
        group.counts.append(len(tokens))
        group.kv.append(kv)
        self.inputs += len(tokens)
        self.room -= len(tokens)
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
        self._entries += k
        return len(self._dists) - 1

    def vectors_in(self, ring: int, offset: int, rows: list[int]) -> int:
        """Vectors of a ring in that fill rows. Returns the index of this reading in the step."""
        self._vectors.append((ring, offset, len(rows)))
        self._vector_into.extend(rows)
        return len(self._vectors) - 1

    def vectors_out(self, ring: int, offset: int, sources: list[int]) -> int:
        """Rows, or ~token ids, that go to a ring out. Returns the index of this writing."""
        self._embeds.append((ring, offset, len(sources)))
        self._embed_from.extend(sources)
        return len(self._embeds) - 1

    # --- what a sample has beside its parameters; `index` is the latest sample's ---

    def mask_sample(self, index: int, ring: int, offset: int) -> None:
        self._masks.append((index, ring, offset))

    def bias(self, index: int, bias: list[tuple[int, float]]) -> None:
        self._bias_samples.extend([index] * len(bias))
        self._bias_tokens.extend([token for token, _ in bias])
        self._bias_values.extend([value for _, value in bias])

    def penalize(
        self, index: int, repetition: float, presence: float, frequency: float, history: History
    ) -> None:
        """No token of the history may be one of this step."""
        prompt = history.prompt + history.tail_prompt
        self._penalties.append((index, repetition, presence, frequency, prompt, len(history)))
        self._history.extend(history.tokens)
        for token in history.tail:
            self._history.append(token if type(token) is int else late_token(token))  # type: ignore[arg-type]

    def logprob(self, index: int) -> int:
        """Returns the index among the step's log-probabilities."""
        self._logprobs.append(index)
        return len(self._logprobs) - 1

    def message(self) -> Step:
        paged, listed = self._paged, self._listed
        inputs = paged.followed_by(listed) if listed.counts else paged
        step = Step(
            step=self.number,
            clear_pages=array("i", self._clear_pages).tobytes(),
            clear_slots=self._clear_slots.tobytes(),
            copy_source=self._copy_source.tobytes(),
            copy_target=self._copy_target.tobytes(),
            hide=self._hide.tobytes(),
            show=self._show.tobytes(),
            tokens=inputs.tokens.tobytes(),
            positions=inputs.positions.tobytes(),
            write_slots=inputs.writes.tobytes(),
            paged_inputs=paged.counts.tobytes(),
            paged_kv=paged.kv.tobytes(),
            paged_pages=paged.runs.tobytes(),
            listed_inputs=listed.counts.tobytes(),
            listed_kv=listed.kv.tobytes(),
            listed_slots=listed.runs.tobytes(),
            listed_masks=self._listed_masks,
            keep_inputs=inputs.keep.tobytes(),
            keep_rows=inputs.rows.tobytes(),
            sample_rows=self._sample_rows.tobytes(),
            temperature=self._temperature.tobytes(),
            top_k=self._top_k.tobytes(),
            top_p=self._top_p.tobytes(),
            min_p=self._min_p.tobytes(),
            uniform=self._uniform.tobytes(),
            dists=self._dists,
        )
        if inputs.vectors or self._vectors or self._embeds:
            step.vectors = self._vectors
            step.vector_into = _packed(self._vector_into)
            step.vector_inputs = _packed(inputs.vectors)
            step.vector_rows = _packed(inputs.vector_rows)
            step.embeds = self._embeds
            step.embed_from = _packed(self._embed_from)
        if self._swap_out or self._swap_in:
            step.swap_out_pages = _packed([*self._swap_out.keys()])
            step.swap_out_places = _packed([*self._swap_out.values()])
            step.swap_in_places = _packed([*self._swap_in.keys()])
            step.swap_in_pages = _packed([*self._swap_in.values()])
        if self._masks or self._bias_tokens or self._penalties or self._logprobs:
            step.masks = self._masks
            step.bias_samples = _packed(self._bias_samples)
            step.bias_tokens = _packed(self._bias_tokens)
            step.bias_values = array("f", self._bias_values).tobytes()
            step.penalties = self._penalties
            step.history = self._history.tobytes()
            step.logprobs = _packed(self._logprobs)
        return step


def late_token(late: Late) -> int:
    """How the step message writes a token: its id if known, else where it will be."""
    if late.value is not None:
        return late.value
    return ~(late.step % LATE_STEPS * MAX_SAMPLES + late.index)
