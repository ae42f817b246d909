"""The backend in one process: a model, its KV pool and the steps run on them.

`Backend.run(step)` is a whole step. The server (`server.py`) uses its two halves, `submit` and
`finish`, so that on CUDA the next step is on its way before this one's results are back.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import psutil
import torch
from inferlet.abi import ModelInfo

from piehost.host.shm import RingWriter
from piehost.wire.step import LATE_STEPS, MAX_SAMPLES, Step, StepDone

from .batch import AttentionBatch, Ints, integers
from .engine import AttentionEngine, attending_with
from .errors import LoadError
from .kv_pool import KvPool
from .loader import SMALL_MODEL, LoadedModel, OnProgress, load_model
from .sampling import SamplingParams, distributions, sample
from .self_check import self_check
from .torch_engine import TorchEngine

TRAITS: Final = ["Allocate", "Forward", "InputText", "Tokenize", "OutputText"]
_MOST_SLOTS: Final = 1 << 20  # of the default pool; more is for --kv-pages to ask
_MOST_ROWS: Final = 8192
_ROW_BYTES: Final = 256 << 20  # hidden rows take no more than this
_LOGITS: Final = 1 << 25  # logits computed at once: 128 MiB of float32


@dataclass(slots=True)
class Pending:
    """A step on its way. Its tensors are on the host and filled once `done` has happened."""

    step: Step
    began: float
    tokens: torch.Tensor | None = None  # i32 [K]
    # for each K asked for: which of `step.dists`, ids i32 [R, K], probabilities f32 [R, K]
    dists: list[tuple[Ints, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    done: torch.cuda.Event | None = None
    error: str | None = None


class Backend:
    """A loaded model that runs steps.

    `device`: "auto", "cpu" or "cuda"; `dtype`: "auto", "float32", "bfloat16" or "float16";
    `engine`: "auto", "torch" or "flashinfer". The pool has `kv_pages` pages, or as many as take
    the fraction `kv_memory` of the device's free memory. `threads` is torch's number of compute
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
        self.engine = choose_engine(engine, self.pool)
        self._late = torch.zeros(LATE_STEPS * MAX_SAMPLES, dtype=torch.int32, device=self.device)
        self._rings: dict[int, RingWriter] = {}
        progress("comparing with the reference", 0.9)
        self_check(self.loaded, self.pool, self.run)
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
            traits=TRAITS,
            architecture=loaded.architecture,
            page_size=self.pool.page_size,
            vocab_size=loaded.vocab_size,
            hidden_size=loaded.hidden_size,
            max_context=loaded.max_context,
            bos_token=loaded.bos_token,
            eos_tokens=loaded.eos_tokens,
            chat_template=loaded.vocabulary.chat_template,
        )

    def add_ring(self, ring: int, fd: int, size: int) -> None:
        """Maps a ring for `get_next_dist`; `fd` may be closed afterwards. ValueError if it is
        not a ring of `size` bytes."""
        self._rings[ring] = RingWriter(fd, size)

    def drop_ring(self, ring: int) -> None:
        """Unmaps a ring; distributions for it answer -1 from now on."""
        if writer := self._rings.pop(ring, None):
            writer.close()

    # --- a step ---------------------------------------------------------------------------

    def run(self, step: Step) -> StepDone:
        """Runs a step to its end. A step that fails says so in `error`; nothing of it counts."""
        return self.finish(self.submit(step))

    def submit(self, step: Step) -> Pending:
        """Starts a step (on the CPU: runs it)."""
        pending = Pending(step, time.perf_counter())
        try:
            with torch.inference_mode():
                self.pool.apply(step)
                if step.tokens:
                    self._forward(step)
                if step.sample_rows:
                    self._sample(step, pending)
                if step.dists:
                    self._read_dists(step, pending)
                if self.overlaps:
                    pending.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    pending.done.record()
        except Exception as error:  # out of memory, a slot that is not there: the server goes on
            self._failed(pending, error)
        return pending

    def finish(self, pending: Pending) -> StepDone:
        """Waits for a step, writes its distributions into the rings, and says how it went."""
        number = pending.step.step
        tokens, entries = b"", []
        if pending.error is None:
            try:
                if pending.done is not None:
                    pending.done.synchronize()
                if pending.tokens is not None:
                    tokens = pending.tokens.numpy().tobytes()
                entries = self._write_dists(pending)
            except Exception as error:
                self._failed(pending, error)
        seconds = time.perf_counter() - pending.began
        if pending.error is not None:
            return StepDone(number, seconds=seconds, error=pending.error)
        return StepDone(number, tokens=tokens, dists=entries, seconds=seconds)

    def _forward(self, step: Step) -> None:
        batch = AttentionBatch.of(step)
        tokens = self.pool.upload(integers(step.tokens))
        if np.frombuffer(step.tokens, np.int32).min() < 0:
            late = self._late.index_select(0, (~tokens).clamp_min(0))
            tokens = torch.where(tokens < 0, late.to(torch.int64), tokens)
        positions = self.pool.upload(batch.positions)
        self.pool.mark_written(self.pool.upload(batch.write_slots), positions)
        self.engine.plan(batch)
        with attending_with(self.engine):
            hidden = self.loaded.hidden_states(tokens, positions)
        if step.keep_inputs:
            kept = hidden.index_select(0, self.pool.upload(integers(step.keep_inputs)))
            self.pool.rows.index_copy_(0, self.pool.upload(integers(step.keep_rows)), kept)

    def _logits(self, rows: Ints) -> torch.Tensor:
        return self.loaded.logits(self.pool.rows.index_select(0, self.pool.upload(rows)))

    def _sample(self, step: Step, pending: Pending) -> None:
        rows = integers(step.sample_rows)
        params = SamplingParams.of(step)
        parts = [sample(self._logits(rows[p]), params.take(p)) for p in self._parts(len(rows))]
        tokens = torch.cat(parts)
        first = step.step % LATE_STEPS * MAX_SAMPLES
        self._late[first : first + len(rows)] = tokens
        pending.tokens = self._download(tokens)

    def _read_dists(self, step: Step, pending: Pending) -> None:
        rows = np.array([row for row, *_ in step.dists], np.int64)
        k = np.array([k for _, k, *_ in step.dists], np.int64).clip(max=self.loaded.vocab_size)
        for value in np.unique(k):
            members = np.flatnonzero(k == value)
            for part in self._parts(len(members)):
                ids, chances = distributions(self._logits(rows[members[part]]), int(value))
                pending.dists.append((members[part], self._download(ids), self._download(chances)))

    def _write_dists(self, pending: Pending) -> list[int]:
        """Entries written for each dist: -1 if its ring is gone or too small."""
        entries = [-1] * len(pending.step.dists)
        for members, ids, chances in pending.dists:
            for at, own_ids, own_chances in zip(members, ids.numpy(), chances.numpy(), strict=True):
                _, _, ring, offset = pending.step.dists[at]
                writer = self._rings.get(ring)
                data = own_ids.tobytes() + own_chances.tobytes()
                if writer is not None and writer.write(offset, data):
                    entries[at] = len(own_ids)
        return entries

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
