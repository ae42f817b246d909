"""The backend in one process: a model, its KV pool and the steps run on them.

`Backend.run(step)` is a whole step. The server (`server.py`) uses its two halves, `submit` and
`finish`, so that on CUDA the next step is on its way before this one's results are back.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import psutil
import torch
from inferlet.abi import ModelInfo

from piehost.host.shm import RingReader, RingWriter
from piehost.wire.step import LATE_STEPS, MAX_SAMPLES, Step, StepDone

from . import vectors
from .batch import AttentionBatch, Ints, integers
from .engine import AttentionEngine, attending_with
from .errors import LoadError
from .kv_pool import KvPool
from .loader import SMALL_MODEL, LoadedModel, OnProgress, load_model
from .sampling import SamplingParams, distributions, log_probabilities, sample
from .self_check import self_check, takes_vectors
from .shaping import Shaping
from .swap_space import SwapSpace
from .torch_engine import TorchEngine

TRAITS: Final = ["Allocate", "Forward", "InputText", "Tokenize", "OutputText", "OutputEmbed"]
_MOST_SLOTS: Final = 1 << 20  # of the default pool; more is for --kv-pages to ask
_MOST_ROWS: Final = 8192
_ROW_BYTES: Final = 256 << 20  # hidden rows take no more than this
_LOGITS: Final = 1 << 25  # logits computed at once: 128 MiB of float32

LogitsOf = Callable[[Ints], torch.Tensor]  # rows i64 [R] -> f32 [R, vocab_size]


@dataclass(slots=True)
class Pending:
    """A step on its way. Its tensors are on the host and filled once `done` has happened."""

    step: Step
    began: float
    tokens: torch.Tensor | None = None  # i32 [K]
    maskless: list[int] = field(default_factory=list)  # samples whose mask is refused
    logprobs: torch.Tensor | None = None  # f32 [K]
    # for each K asked for: which of `step.dists`, ids i32 [R, K], probabilities f32 [R, K]
    dists: list[tuple[Ints, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)  # of `step.vectors`
    embeds: torch.Tensor | None = None  # f32 [*, hidden_size]
    done: torch.cuda.Event | None = None
    error: str | None = None


class Backend:
    """A loaded model that runs steps.

    `device`: "auto", "cpu" or "cuda"; `dtype`: "auto", "float32", "bfloat16" or "float16";
    `engine`: "auto", "torch" or "flashinfer". The pool has `kv_pages` pages, or as many as take
    the fraction `kv_memory` of the device's free memory. `swap_pages` as `SwapSpace` takes it.
    `threads` is torch's number of compute
    threads (of the whole process). LoadError if the model cannot be served so.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        engine: str = "auto",
        page_size: int = 16,
        kv_pages: int | None = None,
        kv_memory: float = 0.5,
        swap_pages: int | None = None,
        max_context: int | None = None,
        threads: int | None = None,
        progress: OnProgress = lambda stage, fraction: None,
    ) -> None:
        began = time.perf_counter()
        self.device = choose_device(device)
        self.loaded = load_model(
            model, device=self.device, dtype=dtype, max_context=max_context, progress=progress
        )
        if self.device.type == "cpu":
            torch.set_num_threads(threads or choose_threads(self.loaded.parameters))
        progress("allocating the KV pool", 0.85)
        self.pool = make_pool(self.loaded, page_size, kv_pages, kv_memory)
        self.swap = SwapSpace(self.pool, swap_pages)
        self.engine = choose_engine(engine, self.pool)
        self._late = torch.zeros(LATE_STEPS * MAX_SAMPLES, dtype=torch.int32, device=self.device)
        self._rings: dict[int, tuple[RingWriter, RingReader]] = {}  # out, in
        progress("comparing with the reference", 0.9)
        self_check(self.loaded, self.pool, self.run)
        self._traits = [*TRAITS, "InputEmbed"] if takes_vectors(self.loaded) else TRAITS
        gc.collect()
        gc.freeze()  # a loaded model is for ever; full collections walked it between steps
        self.load_seconds = time.perf_counter() - began

    @property
    def overlaps(self) -> bool:
        """Whether `submit` returns before the step has run."""
        return self.device.type == "cuda"

    @property
    def info(self) -> ModelInfo:
        loaded = self.loaded
        dtype = str(loaded.dtype).removeprefix("torch.")
        size = f"{loaded.parameters / 1e6:.1f}M parameters"
        return ModelInfo(
            name=loaded.name,
            description=f"{loaded.architecture}, {size}, {dtype}",
            traits=list(self._traits),
            architecture=loaded.architecture,
            page_size=self.pool.page_size,
            vocab_size=loaded.vocab_size,
            hidden_size=loaded.hidden_size,
            max_context=loaded.max_context,
            bos_token=loaded.bos_token,
            eos_tokens=loaded.eos_tokens,
            chat_template=loaded.vocabulary.chat_template,
        )

    def add_ring(self, ring: int, out_fd: int, size: int, in_fd: int, in_size: int) -> None:
        """Maps an inferlet's rings, out and in, of `size` and `in_size` octets; the descriptors
        may be closed afterwards. ValueError if they are no rings of these sizes."""
        self._rings[ring] = (RingWriter(out_fd, size), RingReader(in_fd, in_size))

    def drop_ring(self, ring: int) -> None:
        """Unmaps an inferlet's rings; what is for them or from them is refused from now on."""
        for side in self._rings.pop(ring, ()):
            side.close()

    # --- a step ---------------------------------------------------------------------------

    def run(self, step: Step) -> StepDone:
        """Runs a step to its end. A step that fails says so in `error`; nothing of it counts."""
        return self.finish(self.submit(step))

    def submit(self, step: Step) -> Pending:
        """Starts a step (on the CPU: runs it). Raises what makes its swaps fail: they hold the
        only copy of what others have, so a step that fails keeps them."""
        pending = Pending(step, time.perf_counter())
        swaps = bool(step.swap_out_pages or step.swap_in_pages)
        try:
            with torch.inference_mode():
                self.pool.clear(step)
                if swaps:
                    self.swap.move(step)
                    swaps = False
                self.pool.apply(step)
                if step.vectors:
                    pending.refused = vectors.take_in(step, self.pool, self._read_ring)
                if step.tokens:
                    self._forward(step)
                if step.sample_rows or step.dists:
                    self._outputs(step, pending)
                if step.embeds:
                    out = vectors.give_out(step, self.loaded, self.pool)
                    pending.embeds = self._download(out)
                if self.overlaps:
                    pending.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    pending.done.record()
        except Exception as error:  # out of memory, a slot that is not there: the server goes on
            if swaps:
                raise
            self._failed(pending, error)
        return pending

    def finish(self, pending: Pending) -> StepDone:
        """Waits for a step, writes its distributions into the rings, and says how it went."""
        answer = StepDone(pending.step.step)
        if pending.error is None:
            try:
                if pending.done is not None:
                    pending.done.synchronize()
                self._answer(pending, answer)
            except Exception as error:
                self._failed(pending, error)
        if pending.error is not None:
            answer = StepDone(pending.step.step, error=pending.error)
        answer.seconds = time.perf_counter() - pending.began
        return answer

    def _answer(self, pending: Pending, answer: StepDone) -> None:
        step = pending.step
        if pending.tokens is not None:
            tokens = pending.tokens.numpy()
            tokens[pending.maskless] = -1
            answer.tokens = tokens.tobytes()
        if pending.logprobs is not None:
            answer.logprobs = pending.logprobs.numpy()[integers(step.logprobs)].tobytes()
        answer.dists = self._write_dists(pending)
        answer.refused = pending.refused
        if pending.embeds is not None:
            answer.embeds = self._write_embeds(step, pending.embeds.numpy())

    def _forward(self, step: Step) -> None:
        batch = AttentionBatch.of(step)
        inputs = self._resolve(integers(step.tokens))
        if step.vector_inputs:
            inputs = vectors.inputs(step, inputs, self.loaded, self.pool)
        positions = self.pool.upload(batch.positions)
        self.pool.mark_written(self.pool.upload(batch.write_slots), positions)
        self.engine.plan(batch)
        with attending_with(self.engine):
            hidden = self.loaded.hidden_states(inputs, positions)
        if step.keep_inputs:
            kept = hidden.index_select(0, self.pool.upload(integers(step.keep_inputs)))
            self.pool.rows.index_copy_(0, self.pool.upload(integers(step.keep_rows)), kept)

    def _resolve(self, tokens: Ints) -> torch.Tensor:
        """Token ids i64 on the device, of ids and ~late tokens."""
        ids = self.pool.upload(tokens)
        if len(tokens) and tokens.min() < 0:
            late = self._late.index_select(0, (~ids).clamp_min(0))
            ids = torch.where(ids < 0, late.to(torch.int64), ids)
        return ids

    def _outputs(self, step: Step, pending: Pending) -> None:
        """Samples and distributions; those of one hidden state share its logits."""
        sampled = integers(step.sample_rows)
        read = np.array([row for row, *_ in step.dists], np.int64)
        if len(sampled) and not len(read):
            self._sample(step, pending, self._logits, sampled)
            return
        rows, place = np.unique(np.concatenate((sampled, read)), return_inverse=True)
        logits_of: LogitsOf = self._logits  # too many to keep are computed again where shared
        if len(rows) * self.loaded.vocab_size <= _LOGITS:
            logits = self._logits(rows)
            sampled, read = place[: len(sampled)], place[len(sampled) :]

            def logits_of(places: Ints) -> torch.Tensor:
                return logits.index_select(0, self.pool.upload(places))

        if len(sampled):
            self._sample(step, pending, logits_of, sampled)
        self._read_dists(step, pending, logits_of, read)

    def _logits(self, rows: Ints) -> torch.Tensor:
        return self.loaded.logits(self.pool.rows.index_select(0, self.pool.upload(rows)))

    def _sample(self, step: Step, pending: Pending, logits_of: LogitsOf, rows: Ints) -> None:
        params = SamplingParams.of(step)
        shaping = Shaping.of(step, self.loaded.vocab_size, self._read_ring, self._resolve)
        tokens, logprobs = [], []
        for part in self._parts(len(rows)):
            logits = logits_of(rows[part])
            shaped = shaping.apply(logits, int(part[0])) if shaping else logits
            tokens.append(sample(shaped, params.take(part)))
            if step.logprobs:
                logprobs.append(log_probabilities(logits, tokens[-1]))
        drawn = torch.cat(tokens)
        first = step.step % LATE_STEPS * MAX_SAMPLES
        self._late[first : first + len(rows)] = drawn
        pending.tokens = self._download(drawn)
        pending.maskless = shaping.refused if shaping else []
        if logprobs:
            pending.logprobs = self._download(torch.cat(logprobs))

    def _read_dists(self, step: Step, pending: Pending, logits_of: LogitsOf, rows: Ints) -> None:
        k = np.array([k for _, k, *_ in step.dists], np.int64).clip(max=self.loaded.vocab_size)
        for value in np.unique(k):
            members = np.flatnonzero(k == value)
            for part in self._parts(len(members)):
                ids, chances = distributions(logits_of(rows[members[part]]), int(value))
                pending.dists.append((members[part], self._download(ids), self._download(chances)))

    def _write_dists(self, pending: Pending) -> list[int]:
        """Entries written for each dist: -1 if its ring is gone or too small."""
        entries = [-1] * len(pending.step.dists)
        for members, ids, chances in pending.dists:
            for at, own_ids, own_chances in zip(members, ids.numpy(), chances.numpy(), strict=True):
                _, _, ring, offset = pending.step.dists[at]
                if self._write_ring(ring, offset, own_ids.tobytes() + own_chances.tobytes()):
                    entries[at] = len(own_ids)
        return entries

    def _write_embeds(self, step: Step, values: npt.NDArray[np.float32]) -> list[int]:
        """Vectors written for each of `step.embeds`: -1 if its ring is gone or too small."""
        written, at = [], 0
        for ring, offset, count in step.embeds:
            fits = self._write_ring(ring, offset, values[at : at + count].tobytes())
            written.append(count if fits else -1)
            at += count
        return written

    def _write_ring(self, ring: int, offset: int, data: bytes) -> bool:
        rings = self._rings.get(ring)
        return rings is not None and rings[0].write(offset, data)

    def _read_ring(self, ring: int, offset: int, length: int) -> bytes | None:
        rings = self._rings.get(ring)
        return None if rings is None else rings[1].read(offset, length)

    def _parts(self, count: int) -> list[npt.NDArray[np.intp]]:
        """Index arrays that cover 0 .. count - 1, so small that a part's logits fit."""
        most = max(1, _LOGITS // self.loaded.vocab_size)
        return [np.arange(at, min(at + most, count)) for at in range(0, count, most)]

    def _download(self, values: torch.Tensor) -> torch.Tensor:
        """A host copy that is there once the step's event has happened."""
        if self.device.type == "cpu":
            return values
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return host.copy_(values, non_blocking=True)

    def _failed(self, pending: Pending, error: Exception) -> None:
        first_line = (str(error).strip() or "no details").splitlines()[0]
        pending.error = f"{type(error).__name__}: {first_line}"
        slots = integers(pending.step.write_slots)
        slots = slots[(slots >= 0) & (slots < self.pool.slots)]
        with contextlib.suppress(RuntimeError), torch.inference_mode():  # CUDA may be gone
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.pool.forget(self.pool.upload(slots))  # nothing of a failed step counts


def choose_device(device: str) -> torch.device:
    """LoadError if it is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise LoadError(
            "there is no CUDA device, or this torch was built without CUDA", "use --device cpu"
        )
    return torch.device(device)


def choose_threads(parameters: int) -> int:
    """One for small models: a second one waits more than it computes, and the controller and the
    inferlets want that core. Else all cores this process may use."""
    return 1 if parameters < SMALL_MODEL else len(os.sched_getaffinity(0))


def choose_engine(engine: str, pool: KvPool) -> AttentionEngine:
    """LoadError if FlashInfer is asked for where it cannot run."""
    cuda = pool.device.type == "cuda"
    if engine == "flashinfer" and not cuda:
        raise LoadError("the flashinfer engine runs on CUDA only", "use --engine torch")
    if engine == "torch" or not cuda:
        return TorchEngine(pool)
    try:
        from .flashinfer_engine import FlashInferEngine, why_not

        problem = why_not(pool.layers, pool.rows.dtype)
    except ImportError as error:
        problem = f"it cannot be imported ({error})"
    if problem is None:
        return FlashInferEngine(pool)
    if engine == "flashinfer":
        raise LoadError(
            f"the flashinfer engine cannot serve this model: {problem}",
            "use --engine torch; FlashInfer itself comes with piehost[cuda]",
        )
    return TorchEngine(pool)


def make_pool(
    loaded: LoadedModel, page_size: int, kv_pages: int | None, kv_memory: float
) -> KvPool:
    """The pool: `kv_pages` pages, or what the fraction `kv_memory` of free memory holds."""
    if kv_pages is None:
        slot = sum(2 * s.kv_heads * s.head_dim for s in loaded.layers) * loaded.dtype.itemsize
        if loaded.device.type == "cuda":
            free = torch.cuda.mem_get_info(loaded.device)[0]
        else:
            free = psutil.virtual_memory().available
        kv_pages = min(int(free * kv_memory) // slot, _MOST_SLOTS) // page_size
    row = loaded.hidden_size * loaded.dtype.itemsize
    try:
        return KvPool(
            loaded.layers,
            pages=kv_pages,
            page_size=page_size,
            rows=min(_MOST_ROWS, max(1024, _ROW_BYTES // row)),
            hidden_size=loaded.hidden_size,
            dtype=loaded.dtype,
            device=loaded.device,
        )
    except RuntimeError as error:  # torch's out-of-memory errors, CPU and CUDA
        raise LoadError(
            f"no memory for {kv_pages} KV pages of {page_size} slots",
            "give a smaller --kv-pages or --kv-memory",
        ) from error
