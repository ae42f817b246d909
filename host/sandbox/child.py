"""What a child does between its birth and the inferlet's first instruction, in order.

No step needs what an earlier one has given up. Namespaces come first, while the launcher's
descriptors of them are open; the death signal after the change of user, which clears it. The host
moves it into its control group later (`host/cgroups`), since that can take 16 ms.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
from typing import Final, NamedTuple

from piehost.wire.launch import Rlimits, Spawn

from . import identity, mounts
from .bpf import Filter
from .calls import Calls
from .kernel import SeccompProgram

# where the descriptors of `Spawn` go
TARGETS: Final = (0, 1, 2, 3, 4, 5, 6, 7)
RULESET_FD: Final = 9
RESERVED: Final = 10  # the launcher keeps 0 to 9 taken, so that nothing it holds is in the way

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT, _RAISE = 47, 2
_SECCOMP_SET_MODE_FILTER: Final = 1
_U32: Final = 0xFFFFFFFF
_CAPABILITY_HEADER: Final = struct.pack("<Ii", 0x20080522, 0)  # version 3, this process
_DEFAULT_ACTION: Final = bytes(32)  # struct kernel_sigaction: SIG_DFL, no flags, nothing masked
_IGNORED_BY_PYTHON: Final = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT)


class Layers(NamedTuple):
    """What the child is put into, as descriptors of the launcher's, and who it becomes there."""

    around: int | None  # a user namespace
    mounts: int | None  # a mount namespace
    uid: int | None  # with the group of that number
    own_namespace: bool  # a user namespace of its own, instead
    # capabilities, as bits: the only ones it has until it executes a program; and after that
    readers: int
    lasting: int


def set_up(
    spawn: Spawn,
    descriptors: list[int],
    layers: Layers,
    landlock: bool,
    seccomp: tuple[Filter, SeccompProgram] | None,
) -> Calls:
    """The table of everything but the exec. `descriptors` are in the order of `TARGETS`; the
    ruleset, if there is one, is at RULESET_FD, and the filter's secret is filled in."""
    calls = Calls()
    calls.add("setsid", "setsid")
    if spawn.kind == "native":  # Python keeps the zygote's
        default = calls.pointer(_DEFAULT_ACTION)
        for number in _IGNORED_BY_PYTHON:
            calls.add("signals", "rt_sigaction", number, default, 0, 8)
    identity.enter_user_namespace(calls, layers.around)
    if layers.mounts is not None:
        mounts.enter(calls, layers.mounts)
    calls.add("chdir", "chdir", calls.pointer(os.fsencode(spawn.cwd) + b"\0"))
    for descriptor, target in zip(descriptors, TARGETS, strict=True):
        calls.add("descriptors", "dup2", descriptor, target)
    calls.add("descriptors", "close_range", RESERVED, _U32, 0)
    for kind, value in rlimits(spawn.limits).items():
        both = calls.pointer(struct.pack("<QQ", value, value))
        calls.add("rlimits", "prlimit64", 0, kind, both, 0)
    if layers.uid is not None:
        identity.become(calls, layers.uid, layers.readers)
    elif layers.own_namespace:
        identity.become_nobody(calls)
    if spawn.limits.threads is not None and (layers.uid is not None or layers.own_namespace):
        # only now: before, it would have counted what others run
        _, most = resource.getrlimit(resource.RLIMIT_NPROC)
        threads = spawn.limits.threads
        threads = threads if most == resource.RLIM_INFINITY else min(threads, most)
        both = calls.pointer(struct.pack("<QQ", threads, threads))
        calls.add("rlimits", "prlimit64", 0, resource.RLIMIT_NPROC, both, 0)
    calls.add("pdeathsig", "prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
    # had the launcher died before that, this would be somebody else
    calls.add("pdeathsig", "getppid", equals=os.getpid())
    if spawn.kind == "python":  # an exec would undo it
        calls.add("dumpable", "prctl", _PR_SET_DUMPABLE, 0)
    calls.add("no_new_privs", "prctl", _PR_SET_NO_NEW_PRIVS, 1)
    # root's too; with no_new_privs an exec does not bring them back
    sets = (layers.readers, layers.readers, layers.lasting)  # effective, permitted, inheritable
    data = calls.pointer(struct.pack("<6I", *sets, 0, 0, 0))
    calls.add("capabilities", "capset", calls.pointer(_CAPABILITY_HEADER), data)
    if spawn.kind == "native" and layers.lasting:
        capability = layers.lasting.bit_length() - 1
        calls.add("capabilities", "prctl", _PR_CAP_AMBIENT, _RAISE, capability, 0, 0)
    if landlock:
        calls.add("landlock", "landlock_restrict_self", RULESET_FD, 0)
    calls.add("landlock", "close", RULESET_FD)
    if seccomp is not None:
        filter_, program = seccomp
        calls.keep(program)
        for offset in filter_.offsets("pid"):
            calls.add("seccomp", "getpid", store=program.code_address + offset)
        calls.add("seccomp", "seccomp", _SECCOMP_SET_MODE_FILTER, 0, program.address)
    return calls


def add_exec(
    calls: Calls, path: str, argv: list[str], env: dict[str, str], secret: tuple[int, ...]
) -> None:
    """`secret` goes into the registers that execve does not use."""
    variables = [f"{name}={value}" for name, value in env.items()]
    program = calls.pointer(os.fsencode(path) + b"\0")
    calls.add("exec", "execve", program, _strings(calls, argv), _strings(calls, variables), *secret)


def read_report(status: int, calls: Calls) -> tuple[str, int] | None:
    """(stage, errno) of a failed set-up; None if it went well. `status` is at its end."""
    report = os.read(status, 64)
    return calls.failure(report) if report else None


def rlimits(limits: Rlimits) -> dict[int, int]:
    """Each is soft and hard limit at once: a handler for SIGXCPU buys no time."""
    values = {
        resource.RLIMIT_AS: limits.address_space,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_FSIZE: limits.file_size,
        resource.RLIMIT_STACK: limits.stack,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_NICE: 0,
        resource.RLIMIT_RTPRIO: 0,
    }
    if limits.cpu_seconds is not None:
        values[resource.RLIMIT_CPU] = limits.cpu_seconds
    return values


def _strings(calls: Calls, strings: list[str]) -> int:
    """The address of a null-terminated array of null-terminated strings."""
    addresses = [calls.pointer(os.fsencode(string) + b"\0") for string in strings]
    return calls.pointer(struct.pack(f"<{len(addresses) + 1}Q", *addresses, 0))
