"""Scripts: which languages run, under which interpreter, and what that interpreter may read.

The script is the attacker's, so it chooses a name in this table and nothing else: not the file that
is executed, none of its options, not its profile. A language is here once its policy has been
measured (`policies/NAME.toml`) and the tests run an inferlet written in it. A shell is not: what it
does beyond its builtins is to start other programs, which no inferlet may.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

from msgspec import Struct

from .failure import SpawnRefused

_FOLDERS: Final = ("/usr/bin", "/usr/local/bin")  # root's, as the system's libraries are
_FIRST_LINE_BYTES: Final = 256  # as the kernel's BINPRM_BUF_SIZE


class Interpreter(Struct, frozen=True):
    """`name` is the program's, its kind's in inferlet.toml, and its policy's."""

    name: str
    package: str  # of Debian
    names: tuple[str, ...]  # in a #! line
    suffixes: tuple[str, ...]
    options: tuple[str, ...]  # before the script
    readable: tuple[str, ...]  # what of its library lies outside the system's library folders


INTERPRETERS: Final = {
    interpreter.name: interpreter
    for interpreter in (
        Interpreter(
            name="node",
            package="nodejs",
            names=("node", "nodejs"),
            suffixes=(".js", ".mjs", ".cjs"),
            # No compiler, so no memory that is writable and executable; WebAssembly would need one.
            # No threads for a compiler that is off.
            options=("--jitless", "--no-expose-wasm", "--v8-pool-size=0"),
            readable=(
                "/usr/share/nodejs",
                "/usr/local/lib/node_modules",
                "/etc/ssl/openssl.cnf",  # without it, it does not start
            ),
        ),
        Interpreter(
            name="perl",
            package="perl",
            names=("perl",),
            suffixes=(".pl",),
            options=(),
            readable=(
                "/etc/perl",
                "/usr/share/perl",
                "/usr/share/perl5",
                "/usr/local/share/perl",
                "/usr/local/share/perl5",
                "/usr/local/lib/x86_64-linux-gnu/perl",
                "/dev/urandom",  # seeds rand() and the order of hashes
            ),
        ),
    )
}
KINDS: Final = ("native", "python", *INTERPRETERS)  # of inferlet.toml

_BY_NAME: Final = {"python": "python", "python3": "python"} | {
    name: kind for kind, interpreter in INTERPRETERS.items() for name in interpreter.names
}
_BY_SUFFIX: Final = {".py": "python"} | {
    suffix: kind for kind, interpreter in INTERPRETERS.items() for suffix in interpreter.suffixes
}
_LANGUAGES: Final = f"scripts for python, {' and '.join(INTERPRETERS)} run"


def kind_of(path: str, asked: str | None = None) -> str:
    """The kind of the program at `path`: the one of KINDS that was asked for, else by its suffix,
    else by its #! line, else native.

    SpawnRefused if its #! line names no interpreter of the table or another one than that, or gives
    options. (Of a Python script the line is not looked at: nothing in it could change anything.)
    """
    chosen = asked or _BY_SUFFIX.get(Path(path).suffix)
    if chosen == "python":
        return chosen
    words = _first_line(path)
    if words is None:
        return chosen or "native"
    name, options = _named(words)
    kind = _BY_NAME.get(name)
    if kind is None and name != "env":
        raise _refused(
            path,
            f"it is a script with #! for {name or 'nothing'!r}, which runs no inferlets",
            f"{_LANGUAGES}, or compile it; a shell cannot be an inferlet (docs/abi.md, section 1)",
        )
    if kind is None or options:
        raise _refused(
            path,
            f"its #! line gives options to {name} ({' '.join(options)[:80]!r})",
            f"end the line after {name}: an inferlet does not choose how its interpreter runs",
        )
    if chosen is not None and chosen != kind:
        raise _refused(
            path,
            f"its #! line names {name}, but it is given as {chosen}",
            "change one of them: the line, or the suffix or the kind in inferlet.toml",
        )
    return kind


def locate(kind: str) -> str:
    """The real path of the interpreter of that kind. SpawnRefused if it is not installed."""
    for folder in _FOLDERS:
        path = os.path.realpath(f"{folder}/{kind}")
        if Path(path).is_file():
            return path
    raise SpawnRefused(
        "exec",
        errno.ENOEXEC,
        f"there is no {kind} on this machine (looked in {' and '.join(_FOLDERS)})",
        f"install it (apt install {INTERPRETERS[kind].package})",
    )


def _first_line(path: str) -> list[str] | None:
    """The words after #!, or None if the file does not begin so, or is no file one can read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None  # whoever runs it says why
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        head = os.pread(fd, _FIRST_LINE_BYTES, 0)
    finally:
        os.close(fd)
    if not head.startswith(b"#!"):
        return None
    return head[2:].split(b"\n")[0].decode("utf-8", "backslashreplace").split()


def _named(words: list[str]) -> tuple[str, list[str]]:
    """(the interpreter's name, its options). `env NAME` names NAME; of a path the last part."""
    if words and Path(words[0]).name == "env" and len(words) > 1:
        if words[1].startswith("-") or "=" in words[1]:
            return "env", words[1:]
        words = words[1:]
    return Path(words[0]).name if words else "", words[1:]


def _refused(path: str, why: str, hint: str) -> SpawnRefused:
    return SpawnRefused("exec", errno.ENOEXEC, f"{path} cannot be run: {why}", hint)
