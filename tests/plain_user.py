"""Runs a command as a user without any rights, for tests that are run by root.

    python plain_user.py PATH... -- COMMAND...

PATHs are what the user has to reach: in a mount namespace of its own, closed folders above them are
replaced by open ones that hold nothing else. The files themselves stay as they are.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

PLAIN_USER = 54321
_CLONE_NEWNS = 0x20000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000

# the tests of the sandbox run as each of these; both are possible only for root
USERS = ["root", "plain"] if os.getuid() == 0 else ["plain"]


def under(user: str, *paths: Path) -> list[str]:
    """What goes before a command so that `user` runs it, and can reach `paths`."""
    if user == "root" or os.getuid() != 0:
        return []
    needed = {sys.base_prefix, sys.prefix, str(Path(__file__).parents[1]), *map(str, paths)}
    needed |= {path for path in sys.path if os.path.isdir(path)}
    return [sys.executable, "-P", __file__, *sorted(needed), "--"]


def main() -> None:
    split = sys.argv.index("--")
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    check(libc.unshare(_CLONE_NEWNS))
    check(libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))
    needed = [Path(os.path.realpath(path)) for path in sys.argv[1:split]]
    closed = {top for path in needed if (top := _closed_above(path)) is not None}
    held = {
        path: os.open(path, os.O_PATH)
        for path in needed
        if any(path.is_relative_to(top) for top in closed)
    }
    for top in closed:
        check(libc.mount(b"tmpfs", os.fsencode(top), b"tmpfs", 0, b"mode=755"))
    for path, fd in held.items():
        if not path.exists():
            path.mkdir(mode=0o755, parents=True)
            source = f"/proc/self/fd/{fd}".encode()
            check(libc.mount(source, os.fsencode(path), None, _MS_BIND | _MS_REC, None))
        os.close(fd)
    os.setgroups([])
    os.setresgid(PLAIN_USER, PLAIN_USER, PLAIN_USER)
    os.setresuid(PLAIN_USER, PLAIN_USER, PLAIN_USER)
    os.execv(sys.argv[split + 1], sys.argv[split + 1 :])


def _closed_above(path: Path) -> Path | None:
    """The first folder on the way to `path` that others may not pass."""
    for above in reversed(path.parents):
        if not above.stat().st_mode & 0o001:
            return above
    return None


if __name__ == "__main__":
    main()
