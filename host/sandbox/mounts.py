"""What an inferlet sees of the file system: what it was granted, at the usual paths, and nothing.

Landlock says which files may be opened, but not of which the name, size and owner may be learned.
So each inferlet is put into a mount namespace with an empty root, into which what it may read is
bound. All of it is read-only, so that nothing can be changed or left for others: inferlets with the
same grants share a namespace. The launcher makes it at the first such launch and keeps it; a child
enters it with one call. The folders on the way are the namespace's own: what is granted is reached
also through folders that are closed to the inferlet's user.

Mounting takes CAP_SYS_ADMIN, or a user namespace around all inferlets.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import struct
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from . import kernel
from .calls import Calls
from .identity import CLONE_NEWUSER, enter_user_namespace
from .layout import Layout, plan

_MOST: Final = 32  # namespaces kept
_CLONE_NEWNS: Final = 0x00020000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
_AT_FDCWD: Final = -100
_AT_RECURSIVE: Final = 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 0x1, 0x2, 0x4
_MNT_DETACH: Final = 2
_S_IFREG: Final = 0o100000
# Mounted over: it is there, and nothing in it is ever granted.
_MOUNT_POINT: Final = "/proc"


class Mounts:
    """Makes namespaces. `available` is False where it cannot; `errno` says why.

    `around` is the user namespace it has to do it in, if it has to.
    """

    def __init__(self) -> None:
        self.errno = 0
        self.around: int | None = None
        self._namespaces: OrderedDict[object, int] = OrderedDict()  # by what is in them
        try:
            os.close(self._make(plan([])))
        except OSError:
            self._try_user_namespace()

    @property
    def available(self) -> bool:
        return not self.errno

    def _try_user_namespace(self) -> None:
        try:
            self.around = _user_namespace()
            os.close(self._make(plan([])))
        except OSError as error:
            self.errno = error.errno or errno.EPERM
            if self.around is not None:
                os.close(self.around)
                self.around = None

    def namespace(self, paths: Iterable[str], folder: str) -> int | None:
        """One that shows `paths` and `folder`, the latter if need be empty. Its descriptor stays
        this object's, and is good until the next call. None if all is granted anyway."""
        key = (*map(_seen, paths), _seen(folder))
        found = self._namespaces.get(key)
        if found is None:
            layout = plan(paths, [folder])
            if any(place.path == "/" for place in layout.places):
                return None
            found = self._namespaces[key] = self._make(layout)
            if len(self._namespaces) > _MOST:
                os.close(self._namespaces.popitem(last=False)[1])
        self._namespaces.move_to_end(key)
        return found

    def _make(self, layout: Layout) -> int:
        """Its descriptor. OSError; the stage says what failed."""
        made = ctypes.c_int(-1)
        calls = Calls()
        enter_user_namespace(calls, self.around)
        calls.add("unshare", "unshare", _CLONE_NEWNS)
        path = calls.pointer(b"/proc/self/ns/mnt\0")
        calls.add("open", "openat", _AT_FDCWD, path, os.O_CLOEXEC, store=ctypes.addressof(made))
        _fill(calls, layout)
        try:
            calls.try_in_new_process()
        except OSError:
            if made.value >= 0:
                os.close(made.value)
            raise
        return made.value


def enter(calls: Calls, namespace: int) -> None:
    """A child's way into it, from the user namespace around it; its folder is then the root."""
    calls.add("mounts", "setns", namespace, _CLONE_NEWNS)


def _fill(calls: Calls, layout: Layout) -> None:
    """Makes the root of the mount namespace that the child is in, and drops the old one."""

    def path(text: str) -> int:
        return calls.pointer(os.fsencode(text) + b"\0")

    def restrict(text: str, attributes: int, recursive: int) -> None:
        packed = calls.pointer(struct.pack("<4Q", attributes, 0, 0, 0))  # struct mount_attr
        calls.add(f"mount_setattr {text}", "mount_setattr", _AT_FDCWD, path(text), recursive,
                  packed, 32)  # fmt: skip

    root, point, tmpfs, here = path("/"), path(_MOUNT_POINT), path("tmpfs"), path(".")
    calls.add("mount /", "mount", 0, root, 0, _MS_REC | _MS_PRIVATE, 0)
    calls.add("tmpfs", "mount", tmpfs, point, tmpfs, _MS_NOSUID | _MS_NODEV, path("mode=755"))
    calls.add("tmpfs", "chdir", point)
    calls.add("umask", "umask", 0o022)
    for folder in layout.folders:
        calls.add(f"mkdir {folder}", "mkdir", path(folder[1:]), 0o755)
    for link, text in layout.links:
        calls.add(f"symlink {link}", "symlink", path(text), path(link[1:]))
    for place in layout.places:
        target = place.path[1:]
        if place.is_folder:
            calls.add(f"mkdir {place.path}", "mkdir", path(target), 0o755)
        else:
            calls.add(f"mknod {place.path}", "mknod", path(target), _S_IFREG | 0o444, 0)
        calls.add(f"bind {place.path}", "mount", path(place.path), path(target), 0,
                  _MS_BIND | _MS_REC, 0)  # fmt: skip
        attributes = _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID
        restrict(target, attributes | _MOUNT_ATTR_NODEV * (not place.is_device), _AT_RECURSIVE)
    restrict(".", _MOUNT_ATTR_RDONLY, 0)
    # the old root comes to lie on the new one, and goes
    calls.add("pivot_root", "pivot_root", here, here)
    calls.add("umount", "umount2", here, _MNT_DETACH)


def _seen(path: str) -> object:
    """Equal for as long as `path` leads to the same file: an editor that saves makes a new one."""
    try:
        info = os.stat(path)  # noqa: PTH116  (a Path would take twice as long, for each launch)
    except OSError:
        return path
    return path, info.st_dev, info.st_ino


def _user_namespace() -> int:
    """The descriptor of one that has the names of this process's own, or if that may not be given
    away, its user's alone. OSError."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            kernel.unshare(CLONE_NEWUSER)
            theirs.send(b"\0")
            ours.close()
            theirs.recv(1)
        except OSError as error:
            theirs.send(bytes([error.errno or errno.EPERM]))
        finally:
            os._exit(0)
    try:
        theirs.close()
        told = ours.recv(1) or bytes([errno.EPERM])  # it was killed
        if code := told[0]:
            raise OSError(code, os.strerror(code))
        try:
            for name in ("uid_map", "gid_map"):
                lines = Path(f"/proc/self/{name}").read_text().splitlines()
                text = "".join("{0} {0} {2}\n".format(*line.split()) for line in lines)
                Path(f"/proc/{pid}/{name}").write_text(text)
        except PermissionError:
            Path(f"/proc/{pid}/setgroups").write_text("deny")
            Path(f"/proc/{pid}/uid_map").write_text(f"{os.geteuid()} {os.geteuid()} 1\n")
            Path(f"/proc/{pid}/gid_map").write_text(f"{os.getegid()} {os.getegid()} 1\n")
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        ours.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
