"""Why nothing could be started, in words: what, why, what to try."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final


class SpawnRefused(Exception):
    """Nothing runs. `stage` and `code` (an errno) are for programs, the rest is for people."""

    def __init__(self, stage: str, code: int, message: str, hint: str) -> None:
        super().__init__(message)
        self.stage = stage
        self.code = code
        self.message = message
        self.hint = hint


_CONTROL_HINTS: Final = {
    "seccomp": "use a kernel with CONFIG_SECCOMP_FILTER (any since 4.14), and a container that"
    " allows seccomp(2); or run without it: --allow-degraded=seccomp",
    "landlock": "use Linux 5.13 or later with landlock in its lsm= list;"
    " or run without it: --allow-degraded=landlock",
    "identity": "run piehost as root with CAP_SETUID, CAP_SETGID and CAP_KILL, or allow user"
    " namespaces (sysctl user.max_user_namespaces; kernel.unprivileged_userns_clone on Debian;"
    " a container's seccomp profile); or run without it: --allow-degraded=identity",
    "mounts": "run without it: --allow-degraded=mounts",
    "cgroup": "`piehost doctor` shows which control groups can be used;"
    " or run without them: --allow-degraded=cgroup",
}
CONTROLS: Final = tuple(_CONTROL_HINTS)  # those that `--allow-degraded` can give up
_NAMES: Final = {
    "identity": "way to give an inferlet its own user id or user namespace",
}


def missing_control(control: str, code: int) -> SpawnRefused:
    """The kernel lacks `control`, and the launch does not waive it."""
    return SpawnRefused(
        control,
        code,
        f"the sandbox cannot be built: this machine has no {_NAMES.get(control, control)}"
        f" ({os.strerror(code)})",
        _CONTROL_HINTS[control],
    )


def no_more_ids(path: str, error: OSError) -> SpawnRefused:
    return SpawnRefused(
        "identity",
        error.errno or 0,
        f"{path} could not be started: {error.strerror}",
        "stop some inferlets",
    )


def closed_file(path: str, closed: str, wanted: int) -> SpawnRefused:
    """The inferlet's own user could not read (S_IROTH) or execute (S_IXOTH) what it has to."""
    mode = Path(closed).stat().st_mode
    what = closed if closed == path else f"{closed}, which it needs,"
    change = "o+rx" if mode & 0o111 else "o+r"
    if stat.S_ISDIR(mode):
        change = "-R o+rX" if wanted & stat.S_IROTH else "o+x"
    return SpawnRefused(
        "identity",
        errno.EACCES,
        f"{path} could not be started: {what} is closed to its own user id"
        f" (mode {mode & 0o7777:04o})",
        f"chmod {change} {closed}; or run it as the host's user: --allow-degraded=identity",
    )


def no_namespace(path: str, error: OSError) -> SpawnRefused:
    return SpawnRefused(
        "mounts",
        error.errno or 0,
        f"{path} could not be started: its file system could not be put together"
        f" ({error.filename}: {error.strerror})",
        _CONTROL_HINTS["mounts"],
    )


_EXEC: Final = {
    errno.ENOENT: (
        "it, or its dynamic linker, is not there",
        "check the path; `ldd` shows libraries",
    ),
    errno.EACCES: ("it may not be executed", "chmod +x; look for a noexec mount"),
    errno.ENOEXEC: ("its format is not one this machine can run", "build it for this machine"),
    errno.ENOMEM: ("it does not fit into its address space", "raise the address_space quota"),
    errno.E2BIG: ("its arguments are too long", "pass large inputs as messages"),
    errno.ETXTBSY: ("it is open for writing somewhere", "wait until the build has finished"),
}


def failed_stage(stage: str, code: int, path: str) -> SpawnRefused:
    """The child's own set-up failed at `stage`."""
    if stage == "exec":
        why, hint = _EXEC.get(code, (os.strerror(code), "run it by hand to see whether it starts"))
        return SpawnRefused(stage, code, f"{path} could not be started: {why}", hint)
    if stage == "chdir":
        return SpawnRefused(
            stage,
            code,
            f"{path} could not be started: its folder cannot be entered ({os.strerror(code)})",
            "check that the folder is there and readable",
        )
    hint = "run `piehost doctor`"
    if code in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE):
        hint = "stop some inferlets, or raise the machine's limits"
    return SpawnRefused(
        stage,
        code,
        f"{path} could not be started: the step {stage!r} of its set-up failed"
        f" ({os.strerror(code)})",
        hint,
    )


def unforeseen(path: str, error: Exception) -> SpawnRefused:
    """The launcher itself failed on this launch."""
    return SpawnRefused(
        "launcher",
        0,
        f"{path} could not be started: {type(error).__name__}: {error}",
        "this is a fault of piehost: please report it, with the program",
    )
