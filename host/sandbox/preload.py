"""What the zygote imports before it forks, so that Python inferlets find it imported."""

from __future__ import annotations

import gc
import importlib
import os
from typing import Final

_MODULES: Final = (
    "inferlet",
    "msgspec", "numpy", "numpy.random",
    "argparse", "ast", "asyncio", "atexit", "base64", "bisect", "collections.abc",
    "concurrent.futures", "contextlib", "copy", "dataclasses", "datetime", "enum", "fractions",
    "functools", "hashlib", "heapq", "inspect", "io", "itertools", "json", "linecache", "logging",
    "math", "operator", "pathlib", "pkgutil", "pprint", "queue", "random", "re", "secrets",
    "selectors", "socket", "statistics", "string", "struct", "textwrap", "threading", "time",
    "traceback", "types", "typing", "unicodedata", "uuid", "zlib",
    "encodings.idna", "encodings.latin_1", "encodings.utf_8", "encodings.ascii",
)  # fmt: skip


def preload() -> None:
    """Imports everything, and then needs no environment any more: a fork gets its own."""
    for module in _MODULES:
        importlib.import_module(module)
    os.environ.clear()
    gc.collect()


def freeze() -> None:
    """What exists now is never collected, so a fork's collector does not write to (and so copy) the
    pages it lies in. The launcher itself makes no cycles."""
    gc.disable()
    gc.freeze()
