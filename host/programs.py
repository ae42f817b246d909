"""What `piehost launch` is given, as a program: a script, an executable, or a folder of either.

Only metadata is read here (file type, ELF header, a #! line, inferlet.toml): the host never parses
a script. `check_syntax` does, so it is for the client's own process.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from .errors import NotFound, Refused
from .quotas import Value
from .regular_file import read_start
from .sandbox import elf, interpreters
from .sandbox.failure import SpawnRefused

MANIFEST: Final = "inferlet.toml"
_MAX_MANIFEST_BYTES: Final = 65536
_MAX_SCRIPT_BYTES: Final = 4 << 20


class Program(Struct, kw_only=True):
    """Something that can be launched. `path` is absolute and real."""

    profile: str  # "native", "python", or a script's interpreter
    path: str
    name: str  # safe for ids: letters, digits, dot, dash and underscore
    cwd: str
    readable: list[str]  # beyond the profile's own
    quota: dict[str, Value]
    children: dict[str, str] = {}  # paths of what it may spawn, in its folder, by name

    @property
    def kind(self) -> str:
        """Who starts it: "python" is a fork of the zygote, "native" an exec."""
        return "python" if self.profile == "python" else "native"


class Manifest(Struct, forbid_unknown_fields=True):
    """inferlet.toml."""

    entry: str
    name: str | None = None
    description: str = ""  # for people
    kind: str | None = None
    quota: dict[str, Value] = {}
    children: dict[str, str] = {}


def resolve(path_text: str) -> Program:
    """The program at an absolute path.

    NotFound if nothing is there; Refused if it cannot run here, with the reason.
    """
    path = Path(path_text)
    if not path.is_absolute() or "\0" in path_text:
        raise Refused(f"{path_text!r} is not an absolute path", code="bad_path")
    try:
        real = path.resolve(strict=True)
    except FileNotFoundError as error:
        raise NotFound(
            f"there is no program {path}",
            "no such file or folder",
            "check the path; a script, an executable, or a folder with inferlet.toml",
        ) from error
    except (OSError, RuntimeError) as error:  # a loop of links is either
        raise _unreadable(path, error) from error
    if real.is_dir():
        return _folder(real)
    return Program(
        profile=_profile(real, None),
        path=str(real),
        name=_safe_name(path.stem),
        cwd="/",
        readable=[str(real)],
        quota={},
    )


def resolve_child(parent: Program, name: str) -> Program:
    """The program that `parent` calls `name` in its `children`. NotFound, Refused as `resolve`."""
    folder = Path(parent.cwd)
    entry = _inside(folder, parent.children[name], f"the child {name}")
    return Program(
        profile=_profile(entry, None),
        path=str(entry),
        name=_safe_name(name),
        cwd=parent.cwd,
        readable=parent.readable,
        quota=parent.quota,
        children=parent.children,
    )


def check_syntax(program: Program) -> None:
    """Refused if `program` is a script that does not parse. Parses it: not for the host."""
    if program.kind != "python":
        return
    try:
        with Path(program.path).open("rb") as file:
            source = file.read(_MAX_SCRIPT_BYTES + 1)
        if len(source) > _MAX_SCRIPT_BYTES:
            raise Refused(f"{program.path} is over {_MAX_SCRIPT_BYTES} octets", code="too_large")
        compile(source, program.path, "exec", dont_inherit=True)
    except OSError as error:
        raise _unreadable(Path(program.path), error) from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where, why = program.path, str(error)
        if isinstance(error, SyntaxError):
            where = f"{program.path}, line {error.lineno}"
            why = error.msg + (f": {error.text.strip()}" if error.text else "")
        raise Refused(
            f"the script does not parse: {where}",
            why,
            f"fix it; `python3 -m py_compile {program.path}` shows the same error",
            "syntax_error",
        ) from error


def _folder(folder: Path) -> Program:
    manifest = _read_manifest(folder / MANIFEST)
    entry = _inside(folder, manifest.entry, "the entry")
    if manifest.kind not in (None, *interpreters.KINDS):
        raise Refused(
            f"kind {manifest.kind!r} in {folder / MANIFEST} is unknown",
            hint=", ".join(interpreters.KINDS),
            code="bad_manifest",
        )
    return Program(
        profile=_profile(entry, manifest.kind),
        path=str(entry),
        name=_safe_name(manifest.name or folder.name),
        cwd=str(folder),
        readable=[str(folder)],
        quota=manifest.quota,
        children=manifest.children,
    )


def _inside(folder: Path, text: str, what: str) -> Path:
    """The real path of the file that the manifest of `folder` names. NotFound, or Refused."""
    try:
        path = (folder / text).resolve()
        found = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a null character
        raise Refused(
            f"{what} {text!r} of {folder} cannot be followed",
            str(error),
            f"change it in {folder / MANIFEST}",
            "bad_manifest",
        ) from error
    if not path.is_relative_to(folder):
        raise Refused(
            f"{what} {text!r} lies outside {folder}",
            "an inferlet may read its own folder only",
            f"move it there, or change it in {folder / MANIFEST}",
            "bad_manifest",
        )
    if not found:
        raise NotFound(
            f"{what} {text!r} of {folder} is not there",
            f"{MANIFEST} names it",
            f"build it (in C: make), or change it in {folder / MANIFEST}",
        )
    return path


def _read_manifest(path: Path) -> Manifest:
    try:
        data = read_start(path, _MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError as error:
        raise Refused(
            f"{path.parent} is a folder without {MANIFEST}",
            "a folder needs one to be launched",
            f'write one with at least: entry = "main.py" (in {path})',
            "no_manifest",
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        if len(data) > _MAX_MANIFEST_BYTES:
            raise ValueError(f"over {_MAX_MANIFEST_BYTES} octets")
        return msgspec.convert(tomllib.loads(data.decode()), Manifest)
    except (ValueError, RecursionError) as error:  # TOML, UTF-8 and msgspec errors are ValueErrors
        raise Refused(
            f"{path} is wrong",
            str(error),
            "keys: entry, name, description, kind, and the tables [quota] and [children]",
            "bad_manifest",
        ) from error


def _profile(path: Path, asked: str | None) -> str:
    """What runs the file, `asked` in its manifest if at all. Refused unless it can run here."""
    if not path.is_file():
        raise Refused(f"{path} is no regular file", code="not_executable")
    try:
        profile = interpreters.kind_of(str(path), asked)
        if profile == "native":
            elf.interpreter(str(path))
            return profile
        if profile in interpreters.INTERPRETERS:
            interpreters.locate(profile)
        path.open("rb").close()
        return profile
    except OSError as error:
        raise _unreadable(path, error) from error
    except SpawnRefused as refused:
        raise Refused(refused.message, hint=refused.hint, code="not_executable") from refused


def _unreadable(path: Path, error: Exception) -> Refused:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return Refused(f"cannot read {path}", why, "check its permissions", "unreadable")


def _safe_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text)[:48].strip(".-_") or "inferlet"
