"""The scripted model: a backend without weights, without torch, ready in a fraction of a second.

It carries out the same steps (`wire.step`) with the same rules of attention, so that a program
meets the real controller, real pages and real sampling; only what the model says is written down
(`scripted_rules.py`). A slot holds a token and its position. The hidden state of an input is the
(position, token) sequence it attends to. From that the next token's distribution follows: 0.9 for
the scripted token, if there is one, and the rest spread over all others by a checksum of the
sequence, so that one wrong slot changes every number. As vectors, `scripted_vectors.py` has them.
"""

from __future__ import annotations

import json
import time
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from inferlet.abi import ModelInfo, read_vocab_table
from tokenizers import Tokenizer

from piehost.host.shm import RingReader, RingWriter
from piehost.wire.step import LATE_STEPS, MAX_SAMPLES, Step, StepDone

from .batch import AttentionBatch, Ints, integers, pages_of, starts
from .errors import LoadError
from .scripted_rules import Rules, read_script
from .scripted_sampling import Floats, allow_only, distribution, draw, log_softmax, penalize
from .scripted_vectors import Hidden, of_state, of_token, to_state, to_token
from .vocabulary import Vocabulary, make_vocabulary

SCRIPTED: Final = "scripted"  # --model scripted, or scripted:PATH.toml
SCRATCH_SLOTS: Final = 512
TRAITS: Final = [
    *("Allocate", "Forward", "InputText", "InputEmbed"),
    *("Tokenize", "OutputText", "OutputEmbed"),
]
_TOKENIZER: Final = Path(__file__).resolve().parent / "default_model"
_PAGES: Final = 8192
_ROWS: Final = 8192
_SCRIPTED_CHANCE: Final = 0.9
_SPREAD: Final = 6.0  # the checksum gives each token a logit from 0 to this
_NO_TEXT: Final = -20.0  # and this to control tokens: they come when they are scripted

Column = npt.NDArray[Any]


def is_scripted(model: str) -> bool:
    """Whether `--model` names a scripted model."""
    return model.partition(":")[0] == SCRIPTED


class ScriptedBackend:
    """Says what the script of `model` ("scripted" or "scripted:PATH.toml") tells it.

    `kv_pages` pages of `page_size` slots, `swap_pages` to swap to (None: as many); positions below
    `max_context`, if that is less than the embedded model's own. LoadError if the script is not
    there or wrong.
    """

    overlaps = False

    def __init__(
        self,
        model: str,
        *,
        page_size: int = 16,
        kv_pages: int | None = None,
        swap_pages: int | None = None,
        max_context: int | None = None,
    ) -> None:
        began = time.perf_counter()
        script = read_script(_script_path(model))
        config = json.loads((_TOKENIZER / "config.json").read_text())
        end_tokens: list[int] = config["eos_token_id"]
        self.vocabulary = _embedded_vocabulary(config)
        self._rules = Rules(script, self.vocabulary, end_tokens)
        self.pages = kv_pages or _PAGES
        self.rows = _ROWS
        slots = self.pages * page_size + SCRATCH_SLOTS
        self._token = np.zeros(slots, np.int32)
        self._position = np.full(slots, -1, np.int32)  # -1: unwritten
        self._visible = np.ones(slots, np.bool_)
        self.swap_pages = self.pages if swap_pages is None else swap_pages
        self._swapped = [  # token, position, visible: [swap_pages, page_size] each
            np.zeros((self.swap_pages, page_size), column.dtype)
            for column in (self._token, self._position, self._visible)
        ]
        self._late = np.zeros(LATE_STEPS * MAX_SAMPLES, np.int64)
        self._rings: dict[int, tuple[RingWriter, RingReader]] = {}
        _, special = read_vocab_table(self.vocabulary.table)
        self._control = np.array(special)
        self.info = ModelInfo(
            name=SCRIPTED,
            description=f"says what its script tells it ({len(script.say)} rules)",
            traits=TRAITS,
            architecture="Scripted",
            page_size=page_size,
            vocab_size=len(special),
            hidden_size=config["hidden_size"],
            max_context=min(config["max_position_embeddings"], max_context or 1 << 31),
            bos_token=self.vocabulary.bos_token,
            eos_tokens=end_tokens,
            chat_template=self.vocabulary.chat_template,
        )
        self._vectors = np.zeros((self.rows, self.info.hidden_size), np.float32)
        self.load_seconds = time.perf_counter() - began

    def add_ring(self, ring: int, out_fd: int, size: int, in_fd: int, in_size: int) -> None:
        """Maps a pair of rings; the descriptors may be closed afterwards. ValueError if one is
        not a ring of its size."""
        self._rings[ring] = RingWriter(out_fd, size), RingReader(in_fd, in_size)

    def drop_ring(self, ring: int) -> None:
        """Unmaps them; what needs them answers -1 from now on."""
        for end in self._rings.pop(ring, ()):
            end.close()

    # --- a step ---------------------------------------------------------------------------

    def run(self, step: Step) -> StepDone:
        """Runs a step to its end. A step that fails says so in `error`; nothing of it counts."""
        return self.finish(self.submit(step))

    def submit(self, step: Step) -> StepDone:
        """Runs a step."""
        began = time.perf_counter()
        try:
            done = self._run(step)
        except Exception as error:  # a slot that is not there: the server goes on
            written = integers(step.write_slots)
            self._position[written[(written >= 0) & (written < len(self._position))]] = -1
            done = StepDone(step.step, error=f"{type(error).__name__}: {error}")
        done.seconds = time.perf_counter() - began
        return done

    def finish(self, done: StepDone) -> StepDone:
        """The answer of a step, which `submit` has carried out already."""
        return done

    def _run(self, step: Step) -> StepDone:
        self._keep_books(step)
        refused = self._take_vectors(step)
        if step.tokens:
            self._forward(step)
        tokens, logprobs = self._sample(step)
        return StepDone(
            step.step,
            tokens=np.array(tokens, np.int32).tobytes(),
            dists=[self._write_distribution(*asked) for asked in step.dists],
            logprobs=np.array(logprobs, np.float32).tobytes(),
            refused=refused,
            embeds=self._give_vectors(step),
        )

    def _keep_books(self, step: Step) -> None:
        self._by_page(self._position)[integers(step.clear_pages)] = -1
        self._position[integers(step.clear_slots)] = -1
        self._swap(step)
        source, target = integers(step.copy_source), integers(step.copy_target)
        for column in (self._token, self._position, self._visible):
            column[target] = column[source]  # all are read before any is written
        self._visible[integers(step.hide)] = False
        self._visible[integers(step.show)] = True

    def _by_page(self, column: Column) -> Column:
        """[pages, page_size] view of [slots]."""
        return column[: self.pages * self.info.page_size].reshape(self.pages, -1)

    def _swap(self, step: Step) -> None:
        pages, places = integers(step.swap_out_pages), integers(step.swap_out_places)
        back, free = integers(step.swap_in_places), integers(step.swap_in_pages)
        columns = (self._token, self._position, self._visible)
        for swapped, column in zip(self._swapped, columns, strict=True):
            swapped[places] = self._by_page(column)[pages]
            self._by_page(column)[free] = swapped[back]

    def _forward(self, step: Step) -> None:
        batch = AttentionBatch.of(step)
        tokens = self._resolve(integers(step.tokens))
        vectors = self._vectors[integers(step.vector_rows)]
        vocab_size = self.info.vocab_size
        tokens[integers(step.vector_inputs)] = [to_token(v, vocab_size) for v in vectors]
        self._token[batch.write_slots] = tokens
        self._position[batch.write_slots] = batch.positions
        self._visible[batch.write_slots] = True
        inputs = starts(np.concatenate((batch.paged_inputs, batch.listed_inputs)))
        pages = starts(pages_of(batch.paged_kv, self.info.page_size))
        listed = starts(batch.listed_kv)
        for kept, row in zip(integers(step.keep_inputs), integers(step.keep_rows), strict=True):
            segment = int(np.searchsorted(inputs, kept, side="right")) - 1
            place = int(kept - inputs[segment])  # of the input in its segment
            if segment < len(batch.paged_kv):
                run = batch.paged_pages[pages[segment] : pages[segment + 1]]
                slots = self._paged(run, int(batch.paged_kv[segment]), batch, segment, place)
            else:
                at = segment - len(batch.paged_kv)
                slots = batch.listed_slots[listed[at] : listed[at + 1]]
                slots = self._listed(slots, batch.masks[at], place, int(batch.positions[kept]))
            self._vectors[row] = of_state(self._state(slots), self.info.hidden_size)

    def _paged(self, run: Ints, kv: int, batch: AttentionBatch, segment: int, place: int) -> Ints:
        """The slots that input `place` of a paged segment attends to: a run's first ones."""
        size = self.info.page_size
        slots: Ints = (run[:, None] * size + np.arange(size)).ravel()
        return slots[: kv - int(batch.paged_inputs[segment]) + place + 1]

    def _listed(self, slots: Ints, mask: bytes | None, place: int, position: int) -> Ints:
        """The slots that input `place`, at `position`, of a listed segment attends to."""
        held = self._position[slots]
        if mask is None:
            counts = self._visible[slots] & (held <= position)
        else:
            width = -(-len(slots) // 8)
            row = np.frombuffer(mask, np.uint8, width, place * width)
            counts = np.unpackbits(row, count=len(slots), bitorder="little").astype(np.bool_)
        return slots[counts & (held >= 0)]

    def _state(self, slots: Ints) -> Hidden:
        positions, tokens = self._position[slots], self._token[slots]
        order = np.lexsort((tokens, positions))
        context = tokens[order]
        checksum = zlib.crc32(context.tobytes(), zlib.crc32(positions[order].tobytes()))
        return Hidden(checksum, self._rules.next_token(context.tolist()))

    def _logits(self, row: int) -> Floats:
        """Natural logarithms [vocab_size] of the chances after the hidden state in `row`."""
        state = to_state(self._vectors[row], self.info.vocab_size)
        noise = _noise(state.checksum, len(self._control))
        noise[self._control] = _NO_TEXT
        weights = np.exp(noise)
        if state.says is None:
            noise -= np.log(weights.sum())
        else:
            rest = weights.sum() - weights[state.says]
            noise += np.log((1 - _SCRIPTED_CHANCE) / rest)
            noise[state.says] = np.log(_SCRIPTED_CHANCE)
        return noise.astype(np.float32)

    # --- vectors ----------------------------------------------------------------------------

    def _take_vectors(self, step: Step) -> list[int]:
        """Fills rows from rings in. Those of `step.vectors` that are refused: zeros instead."""
        refused, at = [], 0
        rows = integers(step.vector_into)
        for i, (ring, offset, count) in enumerate(step.vectors):
            ends = self._rings.get(ring)
            width = self.info.hidden_size
            data = ends[1].read(offset, 4 * count * width) if ends else None
            part = np.frombuffer(data or bytes(4 * count * width), np.float32)
            if data is None or not np.isfinite(part).all():
                refused.append(i)
                part = np.zeros_like(part)
            self._vectors[rows[at : at + count]] = part.reshape(count, width)
            at += count
        return refused

    def _give_vectors(self, step: Step) -> list[int]:
        """Vectors written for each of `step.embeds`; -1 if its ring is gone or too small."""
        width = self.info.hidden_size
        source = integers(step.embed_from).tolist()
        written, at = [], 0
        for ring, offset, count in step.embeds:
            part = [
                self._vectors[row] if row >= 0 else of_token(~row, width)
                for row in source[at : at + count]
            ]
            ends = self._rings.get(ring)
            fits = ends is not None and ends[0].write(offset, np.concatenate(part).tobytes())
            written.append(count if fits else -1)
            at += count
        return written

    # --- samples and distributions ----------------------------------------------------------

    def _sample(self, step: Step) -> tuple[list[int], list[float]]:
        """The tokens of all samples, and the log-probabilities of those that want theirs. A sample
        whose mask is refused is drawn without it, for who has queued more behind it; its answer
        is -1."""
        masks = {sample: (ring, offset) for sample, ring, offset in step.masks}
        penalties = self._penalties(step)
        bias_samples, bias_tokens = integers(step.bias_samples), integers(step.bias_tokens)
        bias_values = np.frombuffer(step.bias_values, np.float32)
        wanted = set(integers(step.logprobs).tolist())
        parameters = zip(
            integers(step.sample_rows).tolist(),
            np.frombuffer(step.temperature, np.float32).tolist(),
            np.frombuffer(step.top_k, np.int32).tolist(),
            np.frombuffer(step.top_p, np.float32).tolist(),
            np.frombuffer(step.min_p, np.float32).tolist(),
            np.frombuffer(step.uniform, np.float64).tolist(),
            strict=True,
        )
        tokens: list[int] = []
        logprobs: list[float] = []
        refused: list[int] = []
        for sample, (row, temperature, top_k, top_p, min_p, uniform) in enumerate(parameters):
            own = self._logits(row)
            logits = own.copy()
            if sample in penalties:
                penalize(logits, *penalties[sample])
            first, end = np.searchsorted(bias_samples, (sample, sample + 1))
            np.add.at(logits, bias_tokens[first:end], bias_values[first:end])
            if sample in masks and not allow_only(logits, self._read_mask(*masks[sample])):
                refused.append(sample)
            tokens.append(draw(logits, temperature, top_k, top_p, min_p, uniform))
            if sample in wanted:
                logprobs.append(float(log_softmax(own)[tokens[-1]]))
        start = step.step % LATE_STEPS * MAX_SAMPLES
        self._late[start : start + len(tokens)] = tokens
        for sample in refused:
            tokens[sample] = -1
        return tokens, logprobs

    def _penalties(self, step: Step) -> dict[int, tuple[Ints, int, float, float, float]]:
        """The arguments of `penalize` by sample."""
        history = self._resolve(integers(step.history))
        found: dict[int, tuple[Ints, int, float, float, float]] = {}
        at = 0
        for sample, repetition, presence, frequency, prompt, count in step.penalties:
            found[sample] = history[at : at + count], prompt, repetition, presence, frequency
            at += count
        return found

    def _resolve(self, tokens: Ints) -> Ints:
        """Token ids, with the values of late tokens in their places."""
        late = self._late[np.where(tokens < 0, ~tokens, 0)]
        return np.where(tokens < 0, late, tokens)

    def _read_mask(self, ring: int, offset: int) -> bytes:
        """A bit for each token; none is set if the ring is gone."""
        size = -(-len(self._control) // 8)
        ends = self._rings.get(ring)
        mask = ends[1].read(offset, size) if ends else None
        return mask or bytes(size)

    def _write_distribution(self, row: int, k: int, ring: int, offset: int) -> int:
        """Entries written; -1 if the ring is gone or too small."""
        ends = self._rings.get(ring)
        entries = min(k, len(self._control))
        written = ends is not None and ends[0].write(
            offset, distribution(self._logits(row), entries)
        )
        return entries if written else -1


def _noise(checksum: int, count: int) -> npt.NDArray[np.float64]:
    """[count] numbers from 0 to `_SPREAD` that follow from the checksum (splitmix64, Steele et al.
    2014)."""
    mixed = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(checksum << 20)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    noise = mixed.astype(np.float64)
    noise *= _SPREAD / 2**64
    return noise


def _script_path(model: str) -> Path | None:
    """None for the built-in script. LoadError for `scripted:` with nothing behind it."""
    _, colon, path = model.partition(":")
    if colon and not path:
        raise LoadError(
            "--model scripted: names no script", "--model scripted, or --model scripted:PATH.toml"
        )
    return Path(path) if colon else None


def _embedded_vocabulary(config: dict[str, Any]) -> Vocabulary:
    """The embedded model's, read without transformers, which takes seconds."""
    settings = json.loads((_TOKENIZER / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(_TOKENIZER / "tokenizer.json"))
    return make_vocabulary(
        tokenizer,
        config["vocab_size"],
        {name: settings[name] for name in ("bos_token", "eos_token", "pad_token")},
        settings["chat_template"],
    )
