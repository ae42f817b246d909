"""The core: one backend and one controller, started together and ended together.

They share a link of their own, so when one dies the other is ended too and both start afresh.
What was running on them cannot go on; the host ends it with a typed reason.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any, Final, Protocol

from piehost.wire import control, step
from piehost.wire.client import Progress, Reason

from .allotment import default_rings
from .children import Child, wait_before
from .log import log
from .options import Options
from .rings import RingPool, Rings, RingSizes

_MAX_FAILED_STARTS: Final = 2  # in a row, before the backend was ready


class CoreListener(Protocol):
    """What the core tells its host."""

    def core_progress(self, progress: Progress) -> None:
        """The model is loading."""

    def core_loaded(self, ready: step.Ready) -> None: ...

    def core_rings(self) -> None:
        """There are more rings to take."""

    def core_lost(self, reason: Reason) -> None:
        """Backend and controller are gone; new ones are starting."""

    def core_absent(self, reason: Reason) -> None:
        """After `core_lost`: they fail to start, so it may be long until there are new ones."""

    def core_failed(self, reason: Reason) -> None:
        """They are gone for good."""

    def from_controller(self, message: control.ControllerToHost) -> None: ...


class Core:
    def __init__(self, options: Options, listener: CoreListener) -> None:
        self.ready: step.Ready | None = None
        self.restarts = 0
        self.progress: Progress | None = None  # the latest, while loading
        self._options = options
        self._listener = listener
        self._failed_starts = 0
        self._has_loaded = False  # ever
        self._next_ring = 1
        self.rings: RingPool | None = None
        self.vocabulary = -1  # descriptor, sealed
        self._start()

    def _restart(self) -> None:
        if wait := wait_before(self._failed_starts):
            asyncio.get_running_loop().call_later(wait, self._try_to_start)
        else:
            self._try_to_start()

    def _try_to_start(self) -> None:
        try:
            self._start()
        except OSError as error:  # no room for a process or its descriptors: there may be soon
            log(f"cannot start backend and controller: {error}; trying again")
            self._failed_starts += 1
            self._restart()

    def _start(self) -> None:
        backend_end, controller_end = socket.socketpair()
        self.controller: Child[control.ControllerToHost] = Child(
            "controller",
            "piehost.controller",
            [],
            control.ControllerToHost,
            self._from_controller,
            lambda: self._lost(self.controller),
            link_option="--host-fd",
            passed={"--backend-fd": controller_end},
        )
        try:
            self.backend: Child[step.BackendToHost] = Child(
                "backend",
                "piehost.gpu_backend",
                self._options.backend_arguments(),
                step.BackendToHost,
                self._from_backend,
                lambda: self._lost(self.backend),
                link_option="--host-fd",
                passed={"--controller-fd": backend_end},
                computes=True,
            )
        except OSError:
            self.controller.forget()
            raise
        backend_end.close()
        controller_end.close()

    def processes(self) -> list[Child[Any]]:
        """Those that have not ended."""
        return [child for child in (self.backend, self.controller) if not child.ended]

    def children(self) -> dict[str, int]:
        return {child.name: child.pid for child in self.processes()}

    def take_rings(self, sizes: RingSizes, waiting: int) -> Rings | None:
        """A pair of at least `sizes`, or None: `core_rings` says when to ask again. OSError if
        descriptors are used up."""
        if self.rings is None:
            return None
        rings = self.rings.take(sizes)
        try:
            self.rings.fill(waiting)
        except OSError:
            if rings is None:
                raise
        return rings

    def drop_rings(self, number: int) -> None:
        """The seat of that number is dead."""
        self.backend.send(step.DropRing(ring=number))

    def close(self) -> None:
        """Ends both processes, for good; returns when they are gone."""
        self._drop()
        self.backend.close()
        self.controller.close()

    def _drop(self) -> None:
        self.backend.forget()
        self.controller.forget()
        self.ready = None
        self.progress = None
        if self.rings is not None:
            self._next_ring = self.rings.next_number
            self.rings.close()
            self.rings = None
        if self.vocabulary >= 0:
            os.close(self.vocabulary)
            self.vocabulary = -1

    def _from_controller(self, message: control.ControllerToHost, fds: list[int]) -> None:
        if isinstance(message, control.BackendLost):
            self.backend.end()
        else:
            self._listener.from_controller(message)

    def _from_backend(self, message: step.BackendToHost, fds: list[int]) -> None:
        match message:
            case step.Progress():
                self.progress = Progress(stage=message.stage, fraction=message.fraction)
                self._listener.core_progress(self.progress)
            case step.Ready():
                self._loaded(message, *fds)
            case step.LoadFailed():
                self._drop()
                self._listener.core_failed(
                    Reason(
                        code="load_failed",
                        what=f"cannot load the model {self._options.model}",
                        why=message.message,
                        hint=message.hint,
                    )
                )
            case step.RingMapped():
                if self.rings is not None:
                    self.rings.mapped(message.ring)
                    self._listener.core_rings()

    def _loaded(self, ready: step.Ready, vocabulary: int, tokenizer: int) -> None:
        self.vocabulary = vocabulary
        configure = control.Configure(
            model=ready.model,
            pages=ready.pages,
            rows=ready.rows,
            scratch_slots=ready.scratch_slots,
            policy=self._options.policy,
            special_tokens=ready.special_tokens,
            swap_pages=ready.swap_pages,
        )
        self.controller.send(configure, [tokenizer])
        os.close(tokenizer)
        self._failed_starts = 0
        self._has_loaded = True
        self.backend.reads = True
        self.progress = None
        self.ready = ready
        sizes = default_rings(ready.model.vocab_size)
        self.rings = RingPool(sizes, self._next_ring, self.backend.send)
        self._listener.core_loaded(ready)

    def _lost(self, child: Child[Any]) -> None:
        loaded = self.ready is not None
        which, fault = child.name, child.fault
        self._drop()
        if loaded:
            self.restarts += 1
            reason = Reason(
                code=f"{which}_lost",
                what=f"the {which} process died",
                why=f"{fault or 'it crashed or was killed'}; what ran on it cannot go on",
                hint="launch again: a new one is starting",
            )
        else:
            self._failed_starts += 1
            reason = Reason(
                code=f"{which}_lost",
                what=f"the {which} process died while the model was loading",
                why=fault or "it crashed, was killed, or ran out of memory",
                hint="a smaller model, less --kv-memory, or --debug to see what it printed",
            )
            if self._failed_starts >= _MAX_FAILED_STARTS and not self._has_loaded:
                self._listener.core_failed(reason)
                return
        self._listener.core_lost(reason)
        if self._failed_starts >= _MAX_FAILED_STARTS:
            self._listener.core_absent(reason)
        self._restart()
