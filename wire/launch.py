"""Host and launcher: fork, sandbox, run; then how it ended.

`Spawn` carries descriptors in the order stdin, stdout, stderr, socket (3), ring out (4), ring in
(5), start-up block (6), vocabulary (7). The launcher is the parent, so it alone can reap.
"""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct


class Rlimits(Struct, kw_only=True):
    """Hard limits set in the child; bytes, seconds, counts."""

    address_space: int
    open_files: int
    file_size: int
    cpu_seconds: int | None = None
    stack: int = 8 << 20
    # processes and threads; counts for the inferlet alone if it has its own uid or user namespace
    threads: int | None = None


class Spawn(Struct, array_like=True, tag="spawn"):
    seat: int
    kind: str  # "native": exec `path`; "python": run the script `path` in a fork of the zygote
    path: str  # absolute, real
    # of an executable. A script's arguments are in its start-up block alone: what the zygote has
    # once read, all its later forks could find in their memory
    argv: list[str]
    env: dict[str, str]
    cwd: str
    profile: str  # a policy in host/sandbox/policies; an interpreter's: it is executed, with `path`
    readable: list[str]  # paths granted for reading beyond the profile's own (Landlock)
    limits: Rlimits
    waived: list[str] = []  # controls given up by name (`--allow-degraded`)


class Spawned(Struct, array_like=True, tag="spawned"):
    """Carries one descriptor: a pidfd."""

    seat: int
    pid: int
    sees_all: bool = False  # the names of all files: it has no mount namespace of its grants


class SpawnFailed(Struct, array_like=True, tag="spawn_failed"):
    """Nothing runs. `stage` is the step of the child's set-up that failed, such as "landlock"."""

    seat: int
    stage: str
    errno: int
    message: str
    hint: str


class Exited(Struct, array_like=True, tag="exited"):
    """`status` is waitpid's. `violation` names the system call if seccomp killed it (SIGSYS)."""

    seat: int
    status: int
    user_seconds: float
    system_seconds: float
    max_rss_bytes: int
    violation: str | None = None


LauncherToHost: TypeAlias = Spawned | SpawnFailed | Exited
HostToLauncher: TypeAlias = Spawn
