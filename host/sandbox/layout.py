"""What a file system must hold so that some paths are found in it: folders, links, mount points."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from msgspec import Struct

_MOST_LINKS: Final = 40  # of one path, as in the kernel


class Place(Struct, frozen=True):
    """Something to mount at its own path. `is_device`: what makes devices useless would be too."""

    path: str
    is_folder: bool
    is_device: bool


class Layout(Struct, frozen=True):
    """All paths are absolute, and in the order in which they can be made."""

    folders: list[str]
    links: list[tuple[str, str]]  # path, text
    places: list[Place]


def plan(paths: Iterable[str], folders: Iterable[str] = ()) -> Layout:
    """Of all that exists: each of `paths` is mounted, with what is in it, and reached by the same
    links as here; each of `folders` is there, if need be empty. OSError if one cannot be followed.
    """
    links: dict[str, str] = {}
    ends: dict[str, os.stat_result] = {}
    for path in paths:
        real = _follow(path, links)
        if real is not None:
            ends[real] = Path(real).stat()
    outermost = {path: info for path, info in ends.items() if not _lies_in(path, ends)}
    found = {_follow(path, links) for path in folders} - {None, "/"}
    empty = {path for path in found if path is not None and Path(path).is_dir()}
    seen = {above for path in (*outermost, *links, *empty) for above in _above(path)} | empty
    places = []
    for path, info in sorted(outermost.items()):
        kind = stat.S_IFMT(info.st_mode)
        places.append(Place(path, kind == stat.S_IFDIR, kind in (stat.S_IFCHR, stat.S_IFBLK)))
    return Layout(
        folders=sorted(p for p in seen if p not in outermost and not _lies_in(p, outermost)),
        links=[(p, text) for p, text in sorted(links.items()) if not _lies_in(p, outermost)],
        places=places,
    )


def _follow(path: str, links: dict[str, str]) -> str | None:
    """The real path, and into `links` those on the way. None if nothing is there."""
    at, rest = "/", [part for part in reversed(path.split("/")) if part]
    followed = 0
    while rest:
        part = rest.pop()
        if part in (".", ".."):
            at = str(Path(at).parent) if part == ".." else at
            continue
        full = f"{at.rstrip('/')}/{part}"
        try:
            info = Path(full).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISLNK(info.st_mode):
            at = full
            continue
        followed += 1
        if followed > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        text = links[full] = str(Path(full).readlink())
        at = "/" if text.startswith("/") else at
        rest += [part for part in reversed(text.split("/")) if part]
    return at


def _lies_in(path: str, folders: Iterable[str]) -> bool:
    return any(above in folders for above in _above(path))


def _above(path: str) -> list[str]:
    """Every folder above `path` but the root."""
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(2, len(parts))]
