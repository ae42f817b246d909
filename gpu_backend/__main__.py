"""`python -m piehost.gpu_backend`: loads a model and serves steps until a link closes.

A scripted model is ready before torch would have been imported, so torch is imported only for the
others.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from piehost.wire.link import Link, LinkClosed
from piehost.wire.step import HostToBackend, LoadFailed, Progress, Ready, Step

from . import scripted
from .errors import LoadError
from .server import Server, StepBackend
from .vocabulary import Vocabulary

OnProgress = Callable[[str, float], None]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="piehost.gpu_backend", description=__doc__)
    parser.add_argument(
        "--model", required=True, help='"default", "scripted[:PATH.toml]", a folder, or a hub id'
    )
    parser.add_argument("--host-fd", type=int, required=True, help="inherited link to the host")
    parser.add_argument("--controller-fd", type=int, required=True)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto"
    )
    parser.add_argument("--engine", choices=("auto", "torch", "flashinfer"), default="auto")
    parser.add_argument("--page-size", type=int, choices=(8, 16, 32), default=16)
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument("--kv-pages", type=int, help="pages of the KV pool")
    memory.add_argument("--kv-memory", type=float, default=0.5, help="or: fraction of free memory")
    parser.add_argument("--swap-pages", type=int, help="pages of host memory to swap to; 0: none")
    parser.add_argument("--max-context", type=int, help="no more positions than this")
    parser.add_argument("--threads", type=int, help="torch's compute threads (CPU)")
    return parser.parse_args()


def main() -> int:
    args = _arguments()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the host decides when to end
    # compute threads sleep between operations: spinning, they took 20 times as long and the
    # cores of everyone else (measured with two threads on two busy cores)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each mapped ring holds one
    host: Link[HostToBackend] = Link.from_fd(args.host_fd, HostToBackend)
    controller: Link[Step] = Link.from_fd(args.controller_fd, Step)
    with contextlib.suppress(LinkClosed):
        load = load_scripted if scripted.is_scripted(args.model) else load_model
        try:
            backend, ready, vocabulary = load(
                args, lambda stage, fraction: host.send(Progress(stage, fraction))
            )
        except LoadError as error:
            host.send(LoadFailed(error.message, error.hint))
            return 1
        except LinkClosed:
            raise
        except Exception as error:
            traceback.print_exc()  # for the log; the user gets the line below
            host.send(
                LoadFailed(
                    f"loading {args.model} failed in a way nobody foresaw: "
                    f"{type(error).__name__}: {error}",
                    "look into the backend's log, and report it",
                )
            )
            return 1
        Server(backend, host, controller).serve(ready, vocabulary)
    return 0


Loaded = tuple[StepBackend[Any], Ready, Vocabulary]


def load_model(args: argparse.Namespace, progress: OnProgress) -> Loaded:
    """A model on torch. LoadError if it cannot be served."""
    progress("starting torch", 0.0)
    from .backend import Backend  # takes seconds: only after the first word to the host
    from .kv_pool import SCRATCH_SLOTS

    backend = Backend(
        args.model,
        device=args.device,
        dtype=args.dtype,
        engine=args.engine,
        page_size=args.page_size,
        kv_pages=args.kv_pages,
        kv_memory=args.kv_memory,
        swap_pages=args.swap_pages,
        max_context=args.max_context,
        threads=args.threads,
        progress=progress,
    )
    ready = Ready(
        model=backend.info,
        pages=backend.pool.pages,
        rows=len(backend.pool.rows),
        scratch_slots=SCRATCH_SLOTS,
        device=str(backend.device),
        engine=backend.engine.name,
        load_seconds=backend.load_seconds,
        special_tokens=backend.loaded.vocabulary.special_tokens,
        swap_pages=backend.swap.pages,
    )
    return backend, ready, backend.loaded.vocabulary


def load_scripted(args: argparse.Namespace, progress: OnProgress) -> Loaded:
    """A scripted model. LoadError if its script is wrong, or it is to run on a GPU."""
    if args.device == "cuda" or args.engine == "flashinfer":
        raise LoadError(
            "a scripted model computes nothing, so no device or engine can run it",
            "leave out --device and --engine",
        )
    backend = scripted.ScriptedBackend(
        args.model,
        page_size=args.page_size,
        kv_pages=args.kv_pages,
        swap_pages=args.swap_pages,
        max_context=args.max_context,
    )
    ready = Ready(
        model=backend.info,
        pages=backend.pages,
        rows=backend.rows,
        scratch_slots=scripted.SCRATCH_SLOTS,
        device="cpu",
        engine="scripted",
        load_seconds=backend.load_seconds,
        special_tokens=backend.vocabulary.special_tokens,
        swap_pages=backend.swap_pages,
    )
    return backend, ready, backend.vocabulary


if __name__ == "__main__":
    sys.exit(main())
