"""Whether this machine lets us have control groups: found by making some and trying them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from .groups import Groups, Notify
from .limits import V2
from .places import Missing, Places, find
from .proof import Attempt
from .tree import Tree


class Detection:
    """Under way from the constructor on, beside what else is done. To be made before the processes
    that will be moved, and by the process that starts them."""

    def __init__(self, notify: Notify, memory: int | None = None) -> None:
        """`notify` runs a function on the caller's thread, as `loop.call_soon_threadsafe` does.
        `memory`: the cap of all groups together, in octets; None: three quarters of what there
        is."""
        self._notify = notify
        self._result: Groups | Missing | None = None
        places = _places()
        if isinstance(places, Missing):
            self._result = places
            return
        self._places = places
        try:
            self._tree = Tree(places, memory)
        except OSError as error:
            self._result = _no_tree(places, error)
            return
        try:
            self._attempt = Attempt(self._tree)
        except OSError as error:
            self._tree.close()
            self._result = _no_tree(places, error)

    def result(self) -> Groups | Missing:
        """Waits for the attempt to end, some tenths of a second after the constructor."""
        if self._result is None:
            try:
                problem = self._attempt.result()
                self._tree.put_server_first()  # only now: the attempt is of our own
            except OSError as error:
                problem = str(error)
            if problem is None:
                self._result = Groups(self._tree, self._places, self._notify)
            else:
                self._tree.close()
                self._result = Missing(
                    f"control groups do not hold here: {problem}",
                    "see which controllers /proc/self/cgroup and /proc/cgroups name",
                )
        return self._result

    def close(self) -> None:
        """Removes all groups. Whoever was in them must be dead."""
        groups = self.result()
        if isinstance(groups, Groups):
            groups.close()


def detect(notify: Notify, memory: int | None = None) -> Groups | Missing:
    """`Detection`, when it is done."""
    return Detection(notify, memory).result()


def _places() -> Places | Missing:
    try:  # names of mounts are octets
        mountinfo, cgroup = (
            os.fsdecode(Path("/proc/self", file).read_bytes()) for file in ("mountinfo", "cgroup")
        )
    except OSError as error:
        return Missing(
            f"this kernel tells of no control groups: {error.filename}: {error.strerror}",
            "use a kernel with CONFIG_CGROUPS, and mount /proc",
        )
    return find(mountinfo, cgroup)


def _no_tree(places: Places, error: OSError) -> Missing:
    why = f"cannot make groups in {places.folders['memory']}: {error.strerror or error}"
    if places.version is not V2:
        return Missing(why, "run the host as root, or have the folder given to its user")
    if error.errno in (errno.EROFS, errno.ENODEV):
        folder = places.folders["memory"]
        return Missing(why, f"mount cgroup2 writable at {folder}; in a container, its own group")
    user = "" if os.getuid() == 0 else " --user"
    if error.errno == errno.ENOENT:
        why += " (it was not given all of the controllers memory, pids and cpu)"
    return Missing(
        why,
        "give the host a group of its own:"
        f" systemd-run{user} --scope -p Delegate=yes piehost serve ...",
    )
