"""What each profile comes to on this machine: a compiled filter, and the paths it may read."""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from pathlib import Path
from typing import Final

from msgspec import Struct

from .bpf import KILL, TRACE, Filter, compile_policy
from .elf import LINKER_FOLDERS
from .interpreters import INTERPRETERS
from .policy import load

NATIVE: Final = "native"
DYNAMIC: Final = "dynamic"  # chosen for `native` when the executable asks for a dynamic linker
PYTHON: Final = "python"

_LIBRARIES: Final = (*LINKER_FOLDERS, "/etc/ld.so.cache")
# Links that Debian's library folders lead through. Nobody may list or open anything in it.
_ALTERNATIVES: Final = "/etc/alternatives"


class Profile(Struct):
    name: str
    filter: Filter
    readable: list[str]  # real paths
    visible: list[str]  # those, by all the names that programs use


def compile_profiles(watched: bool) -> dict[str, Profile]:
    """Every profile, ready to use; `watched` if a `Watch` kills for forbidden calls."""
    readable: dict[str, list[str]] = {
        NATIVE: [],
        DYNAMIC: list(_LIBRARIES),
        PYTHON: [*_LIBRARIES, *_interpreter_paths()],
    } | {name: [*_LIBRARIES, *kind.readable] for name, kind in INTERPRETERS.items()}
    forbidden = TRACE if watched else KILL
    return {
        name: Profile(
            name,
            compile_policy(load(name), forbidden),
            _outermost(paths),
            [*paths, _ALTERNATIVES] if paths else [],
        )
        for name, paths in readable.items()
    }


def _interpreter_paths() -> list[str]:
    """The standard library, site-packages, and the SDK wherever it is installed."""
    paths = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    packages = {*site.getsitepackages(), site.getusersitepackages()}
    paths += [path for path in sys.path if path in packages]
    sdk = sys.modules.get("inferlet")
    if sdk is not None and sdk.__file__:
        paths.append(str(Path(sdk.__file__).parent))
    return [path for path in paths if Path(path).is_dir()]


def _outermost(paths: list[str]) -> list[str]:
    """Without those that lie in another, and without those that do not exist."""
    kept: list[str] = []
    for path in sorted({path for path in map(os.path.realpath, paths) if Path(path).exists()}):
        if not any(path.startswith(f"{above}/") for above in kept):
            kept.append(path)
    return kept
