"""Where one inferlet runs: its namespaces, and as which user."""

from __future__ import annotations

import stat
from pathlib import Path

from piehost.wire.launch import Spawn

from .child import Layers
from .failure import closed_file, missing_control, no_more_ids, no_namespace
from .identity import DAC_OVERRIDE, DAC_READ_SEARCH, Identity, closed_to_others
from .mounts import Mounts
from .profiles import NATIVE, Profile


class Places:
    """What this machine can do of it, found out by trying."""

    def __init__(self, may_open_closed: bool) -> None:
        """`may_open_closed`: Landlock says what an inferlet opens, whatever the modes of files are,
        and seccomp keeps it from all else that a right to read, or to override modes, is good
        for."""
        self._may_open_closed = may_open_closed
        self._mounts = Mounts()
        self._identity = Identity(self._mounts.around)
        # by profile: what of it is closed to users of their own
        self._checked: dict[str, tuple[str, int] | None] = {}

    def layers(self, spawn: Spawn, profile: Profile, executable: list[str]) -> Layers:
        """SpawnRefused if a launch that does not waive it would go without. `uid` is to be released
        when the inferlet is gone."""
        granted = [*profile.visible, *profile.readable, *spawn.readable, *executable]
        granted = list(dict.fromkeys(granted))
        readers = self._readers(spawn, profile, granted, executable)
        mounts = self._namespace(spawn, granted)
        uid = None if readers is None else self._uid(spawn)
        if uid is None or readers is None:
            readers = 0
        lasting = readers and (DAC_READ_SEARCH if readers & DAC_READ_SEARCH else DAC_OVERRIDE)
        if spawn.kind == "python":
            readers = lasting
        elif profile.name == NATIVE:  # opens nothing
            lasting = 0
        return Layers(
            around=self._mounts.around,
            mounts=mounts,
            uid=uid,
            own_namespace=self._identity.has_namespace,
            readers=readers,
            lasting=lasting,
        )

    def release(self, uid: int | None) -> None:
        if uid is not None and self._identity.uids is not None:
            self._identity.uids.release(uid)

    def _namespace(self, spawn: Spawn, granted: list[str]) -> int | None:
        if not self._mounts.available:
            return None
        try:
            return self._mounts.namespace(granted, spawn.cwd)
        except OSError as error:
            if "mounts" not in spawn.waived:
                raise no_namespace(spawn.path, error) from error
            return None

    def _uid(self, spawn: Spawn) -> int | None:
        """The inferlet's own; None if it has a user namespace, or goes without."""
        waived = "identity" in spawn.waived
        if not self._identity.available and not waived:
            raise missing_control("identity", self._identity.errno)
        if self._identity.uids is None:
            return None
        try:
            return self._identity.uids.claim()
        except OSError as error:
            if waived:
                return None
            raise no_more_ids(spawn.path, error) from error

    def _readers(
        self, spawn: Spawn, profile: Profile, granted: list[str], executable: list[str]
    ) -> int | None:
        """The capabilities that a user of its own needs to read what is granted: none, mostly. None
        if it must not, or cannot, have them, and has to be the host's user.

        What an inferlet may open is a matter of its grants, not of file modes: root's programs may
        lie in closed folders. But that takes Landlock and seccomp: a socket that is connected to,
        for one, is nothing to Landlock.
        """
        if self._identity.uids is None:
            return 0
        closed = self._closed(spawn, profile, granted, executable)
        if closed is None:
            return 0
        if self._may_open_closed and self._identity.readers:
            return self._identity.readers
        if "identity" in spawn.waived:
            return None
        raise closed_file(spawn.path, *closed)

    def _closed(
        self, spawn: Spawn, profile: Profile, granted: list[str], executable: list[str]
    ) -> tuple[str, int] | None:
        """What a user without rights of their own could not read or execute, but has to."""

        def closed(path: str, wanted: int) -> tuple[str, int] | None:
            above = "/"
            if self._mounts.available:  # folders further up are its namespace's own
                above = min((g for g in granted if f"{path}/".startswith(f"{g}/")), key=len)
            return closed_to_others(path, above, wanted)

        if profile.name not in self._checked:
            found = (closed(path, stat.S_IROTH) for path in profile.readable)
            self._checked[profile.name] = next(filter(None, found), None)
        if self._checked[profile.name] is not None:
            return self._checked[profile.name]
        wanted = stat.S_IXOTH if spawn.path in executable else stat.S_IROTH
        folders = (closed(path, stat.S_IROTH) for path in spawn.readable if Path(path).is_dir())
        return closed(spawn.path, wanted) or next(filter(None, folders), None)
