"""Starts one inferlet: checks what is asked for, prepares everything, forks."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import traceback
from pathlib import Path
from typing import NamedTuple

from piehost.wire.launch import Spawn

from . import elf, interpreters, kernel, script
from .bpf import Filter
from .calls import STATUS_FD, Calls
from .child import RULESET_FD, TARGETS, add_exec, set_up
from .failure import SpawnRefused, failed_stage, missing_control
from .landlock import Landlock
from .places import Places
from .profiles import DYNAMIC, NATIVE, PYTHON, compile_profiles
from .watch import Watch

_KINDS = {"native": (NATIVE, DYNAMIC, *interpreters.INTERPRETERS), "python": (PYTHON,)}


class _Command(NamedTuple):
    """What is executed, and under which profile. A fork of the zygote executes nothing."""

    profile: str
    path: str
    argv: list[str]
    executable: list[str]  # the files that may be: it, and its dynamic linker


class Started(NamedTuple):
    """A child in its set-up. `status` ends when it is through, or when it has told why not."""

    pid: int
    pidfd: int
    status: int
    calls: Calls
    uid: int | None  # its own, to be released when it is gone
    sees_all: bool  # it has no mount namespace


class Starter:
    """What this machine can do, and all that is the same for every launch."""

    def __init__(self, kind: str) -> None:
        """For programs of `kind` only. Also puts the watching filter above this process, where
        that is possible."""
        self.watch: Watch | None = None
        self._kind = kind
        self._landlock = Landlock()
        self._seccomp_errno = 0
        try:
            kernel.check_seccomp()
        except OSError as error:
            self._seccomp_errno = error.errno or errno.ENOSYS
        # before the filter that would stop what it tries
        self._places = Places(self._landlock.available and not self._seccomp_errno)
        if not self._seccomp_errno:
            with contextlib.suppress(OSError):  # then forbidden calls kill, but have no name
                self.watch = Watch()
        self._profiles = compile_profiles(watched=self.watch is not None)
        self._own_address_space = _address_space()
        self._null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def start(self, spawn: Spawn, descriptors: list[int]) -> Started:
        """SpawnRefused if it cannot be; then nothing runs. `descriptors` stay the caller's."""
        if len(descriptors) != len(TARGETS):
            raise SpawnRefused(
                "descriptors",
                errno.EBADF,
                f"{len(descriptors)} descriptors came with the launch, {len(TARGETS)} are needed",
                "this is a fault of piehost: please report it",
            )
        command = self._command(spawn)
        profile = self._profiles[command.profile]
        layers = self._places.layers(spawn, profile, command.executable)
        try:
            readable = [*profile.readable, *spawn.readable]
            landlock = self._ruleset(spawn, readable, command.executable)
            seccomp = self._seccomp(spawn, profile.filter)
            status, end = os.pipe2(os.O_CLOEXEC)
            os.dup2(end, STATUS_FD, inheritable=False)
            os.close(end)
            try:
                calls = set_up(spawn, descriptors, layers, landlock, seccomp)
                if spawn.kind == "native":
                    pid, pidfd = _fork_native(command, spawn.env, calls, seccomp)
                else:
                    pid, pidfd = _fork_python(spawn, calls)
            except BaseException:
                os.close(status)
                raise
        except OSError as error:  # no descriptors, processes or memory left in the launcher
            self.release(layers.uid)
            raise failed_stage("fork", error.errno or 0, spawn.path) from error
        except BaseException:
            self.release(layers.uid)
            raise
        finally:
            os.dup2(self._null, STATUS_FD, inheritable=False)
            os.dup2(self._null, RULESET_FD, inheritable=False)
        return Started(pid, pidfd, status, calls, layers.uid, layers.mounts is None)

    def release(self, uid: int | None) -> None:
        """The inferlet that had it is dead and reaped."""
        self._places.release(uid)

    def _command(self, spawn: Spawn) -> _Command:
        name = spawn.profile
        if spawn.kind != self._kind or name not in _KINDS[self._kind]:
            raise SpawnRefused(
                "profile",
                errno.EINVAL,
                f"this launcher has no profile {name!r} for programs of kind {spawn.kind!r}",
                f"for {self._kind} programs: {', '.join(_KINDS[self._kind])}",
            )
        if spawn.kind == "python":
            _check_script(spawn, self._own_address_space)
            return _Command(name, "", [], [])
        program, argv = spawn.path, spawn.argv
        if name in interpreters.INTERPRETERS:
            _check_readable(spawn.path)
            program = interpreters.locate(name)
            options = interpreters.INTERPRETERS[name].options
            argv = [program, *options, spawn.path, *spawn.argv[1:]]
        linker = elf.interpreter(program)
        if name == NATIVE and linker is not None:
            name = DYNAMIC
        return _Command(name, program, argv, [program] if linker is None else [program, linker])

    def _ruleset(self, spawn: Spawn, readable: list[str], executable: list[str]) -> bool:
        """Makes it at RULESET_FD; False if the launch goes without."""
        if not self._landlock.available:
            if "landlock" not in spawn.waived:
                raise missing_control("landlock", self._landlock.errno)
            return False
        try:
            ruleset = self._landlock.ruleset(readable, executable)
        except OSError as error:
            raise failed_stage("landlock", error.errno or 0, spawn.path) from error
        os.dup2(ruleset, RULESET_FD, inheritable=False)
        os.close(ruleset)
        return True

    def _seccomp(
        self, spawn: Spawn, filter_: Filter
    ) -> tuple[Filter, kernel.SeccompProgram] | None:
        if self._seccomp_errno:
            if "seccomp" not in spawn.waived:
                raise missing_control("seccomp", self._seccomp_errno)
            return None
        return filter_, kernel.SeccompProgram(filter_.code)


def _fork_native(
    command: _Command,
    env: dict[str, str],
    calls: Calls,
    seccomp: tuple[Filter, kernel.SeccompProgram] | None,
) -> tuple[int, int]:
    words = os.urandom(24)
    secret = tuple(int.from_bytes(words[at : at + 8], "little") for at in (0, 8, 16))
    if seccomp is not None:
        filter_, program = seccomp
        for index, word in enumerate(secret):
            filter_.fill(program.code, f"secret{index}", word)
    add_exec(calls, command.path, command.argv, env, secret)
    calls.seal()
    return calls.run_in_new_process()


def _fork_python(spawn: Spawn, calls: Calls) -> tuple[int, int]:
    calls.seal()
    pid = os.fork()
    if pid:
        try:
            return pid, os.pidfd_open(pid)
        except OSError:  # no descriptor left: without one it cannot be watched
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
    try:
        kernel.set_process_name(Path(spawn.path).name)
        calls.run()
        os.close(STATUS_FD)  # it runs
        script.run(spawn.path, spawn.env)
    except BaseException:  # ours, not the script's: such as no memory left for it
        traceback.print_exc()
    finally:
        os._exit(127)


def _check_readable(path: str) -> None:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise SpawnRefused(
            "script",
            error.errno or 0,
            f"{path} cannot be read: {os.strerror(error.errno or 0)}",
            "check the path and its permissions",
        ) from error


def _check_script(spawn: Spawn, own_address_space: int) -> None:
    _check_readable(spawn.path)
    if spawn.limits.address_space < own_address_space:
        raise SpawnRefused(
            "rlimits",
            errno.ENOMEM,
            f"{spawn.path} cannot be started: its limit of {spawn.limits.address_space >> 20} MiB"
            f" of address space is less than the {own_address_space >> 20} MiB Python itself takes",
            "raise the address_space quota",
        )


def _address_space() -> int:
    pages = Path("/proc/self/statm").read_text().split()[0]
    return int(pages) * os.sysconf("SC_PAGESIZE")
