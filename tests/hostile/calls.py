"""Escapes as data: single system calls, which the programs `call.*` of tests/attackers make.

E: refused with EPERM or EACCES. A: no such file, where a mount namespace hides it (ENOENT), else E.
N: no such system call. K: killed, and the report names the call.
"""

from __future__ import annotations

import errno
import os
import re
from typing import NamedTuple

from piehost.host.sandbox import policy

NR = policy.syscalls()
REFUSED = {errno.EPERM, errno.EACCES}
PAGE, ANON, SHARED, PRIVATE = 4096, 0x20, 1, 2
RWX, RX, RW = 7, 5, 3
E, A, N, K = "E", "A", "N", "K"


class Attack(NamedTuple):
    name: str
    call: str | int
    arguments: tuple[int | str, ...] = ()
    expected: str = E

    @property
    def number(self) -> int:
        return NR[self.call] if isinstance(self.call, str) else self.call

    def expected_under(self, profile: str, hides: bool) -> str:
        """`hides`: the inferlet has a mount namespace. The native profile opens nothing at all, so
        it never gets as far as to look for a file."""
        return E if self.expected == A and (profile == "native" or not hides) else self.expected


NETWORK = [
    *(Attack(f"socket family {f}", "socket", (f, 1, 0)) for f in (1, 2, 10, 16, 17, 38, 40)),
    Attack("socket, high bits", "socket", (0x100000002, 1, 0)),
    Attack("connect", "connect", (3, "s:\x01", 20)),
    Attack("bind", "bind", (3, "s:\x01", 20)),
    Attack("listen", "listen", (3, 1)),
    Attack("accept", "accept4", (3, 0, 0, 0)),
    Attack("sendmsg (descriptors)", "sendmsg", (3, 0, 0)),
    Attack("recvmsg (descriptors)", "recvmsg", (3, 0, 0)),
    Attack("socketpair AF_INET", "socketpair", (2, 1, 0, 0)),
    Attack("sendto, an address", "sendto", (3, "s:x", 1, 0, "s:\x01", 10)),
    Attack("sendto, out of band", "sendto", (3, "s:x", 1, 1, 0, 0)),
]
PROCESSES = [
    Attack("ptrace", "ptrace", (16, 1, 0, 0), K),
    Attack("fork", "fork"),
    Attack("vfork", "vfork"),
    Attack("clone, no thread", "clone", (17, 0, 0, 0, 0)),
    Attack("clone, high bits", "clone", (0x1003D0F00, 0, 0, 0, 0)),
    *(
        Attack(f"clone, namespace {f:#x}", "clone", (0x3D0F00 | f, 0, 0, 0, 0))
        for f in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
    ),
    Attack("clone3", "clone3", (0, 0), N),
    Attack("execve", "execve", ("s:/bin/true", 0, 0), N),
    Attack("execve, guessed secret", "execve", ("s:/bin/true", 0, 0, 1, 2, 3), N),
    Attack("execveat", "execveat", (4, "s:", 0, 0, 0x1000), N),
    Attack("unshare", "unshare", (0x10000000,), K),
    Attack("setns", "setns", (3, 0), K),
    Attack("kill everything", "kill", (-1, 0)),
    Attack("tkill", "tkill", (1, 0)),
    Attack("tgkill of nobody", "tgkill", (1 << 23, 1 << 23, 0)),  # by the filter, not the kernel
    Attack("setsid", "setsid"),
    Attack("pidfd_open", "pidfd_open", (1, 0)),
    Attack("pidfd_getfd", "pidfd_getfd", (3, 0, 0), K),
    Attack("process_vm_writev", "process_vm_writev", (1, 0, 0, 0, 0, 0), K),
    Attack("raise own limit", "prlimit64", (0, 7, "s:unlimited", 0)),
    Attack("setrlimit", "setrlimit", (7, 0)),
    Attack("setuid", "setuid", (0,)),
    Attack("setpriority", "setpriority", (0, 0, -20)),
    Attack("sched_setscheduler", "sched_setscheduler", (0, 1, 0)),
]
WEAKENING = [
    *(
        Attack(f"prctl {name}", "prctl", (option, value, 0, 0, 0))
        for name, option, value in [
            ("DUMPABLE", 4, 1),
            ("PTRACER", 0x59616D61, -1),
            ("PDEATHSIG", 1, 0),
            ("SECCOMP", 22, 2),
            ("KEEPCAPS", 8, 1),
            ("SUBREAPER", 36, 1),
            ("high bits", 0x100000004, 1),
        ]
    ),
    Attack("seccomp", "seccomp", (1, 0, 0)),
    Attack("personality", "personality", (0x400000,)),
    Attack("arch_prctl, syscall faulting", "arch_prctl", (0x1012, 0)),
    Attack("modify_ldt", "modify_ldt", (1, 0, 0)),
]
FILES = [
    Attack("open /etc/passwd", "openat", (-100, "s:/etc/passwd", 0, 0), A),
    Attack("open, old call", "open", ("s:/etc/passwd", 0, 0)),
    Attack("openat2", "openat2", (-100, "s:/etc/passwd", 0, 24)),
    Attack("open, dots", "openat", (-100, "s:/usr/lib/../../etc/passwd", 0, 0), A),
    Attack("open /proc/self/environ", "openat", (-100, "s:/proc/self/environ", 0, 0), A),
    Attack("open the root", "openat", (-100, "s:/", 0, 0)),
    Attack("open a path only", "openat", (-100, "s:/etc", 0x200000, 0)),
    Attack("create a file", "openat", (-100, "s:/tmp/escaped", 0x41, 0o600)),
    Attack("write to a library", "openat", (-100, "s:/usr/lib/os-release", 1, 0)),
    Attack("unnamed file", "openat", (-100, "s:/tmp", 0x410002, 0o600)),
    *(
        Attack(f"{call} a path", call, ("s:/tmp", "s:/tmp/escaped", 0, 0, 0))
        for call in (
            "mkdir",
            "rmdir",
            "unlink",
            "rename",
            "link",
            "symlink",
            "chmod",
            "truncate",
            "chdir",
            "setxattr",
            "mknod",
            "utime",
        )
    ),
    *(Attack(f"punch a hole into {fd}", "fallocate", (fd, 3, 0, PAGE)) for fd in (4, 5)),
    *(Attack(f"ftruncate {fd}", "ftruncate", (fd, 0)) for fd in (4, 5)),
    Attack("seal ring in", "fcntl", (5, 1033, 8)),
    Attack("sendfile", "sendfile", (1, 6, 0, 1)),
    *(
        Attack(call, call, (0, 0, 0, 0, 0), K)
        for call in (
            "mount",
            "umount2",
            "pivot_root",
            "chroot",
            "move_mount",
            "open_tree",
            "fsopen",
            "fsconfig",
            "fsmount",
            "fspick",
            "mount_setattr",
        )
    ),
    Attack("inotify", "inotify_init1", (0,)),
    Attack("fanotify", "fanotify_init", (0, 0)),
]
MEMORY = [
    Attack("map W+X", "mmap", (0, PAGE, RWX, PRIVATE | ANON, -1, 0)),
    Attack("map X", "mmap", (0, PAGE, RX, PRIVATE | ANON, -1, 0)),
    Attack("map shared memory", "mmap", (0, PAGE, RW, SHARED | ANON, -1, 0)),
    Attack("map validated shared memory", "mmap", (0, PAGE, RW, 3 | ANON, -1, 0)),
    Attack("map the ring for writing", "mmap", (0, PAGE, RW, SHARED, 4, 0)),
    Attack("map the start-up block for writing", "mmap", (0, PAGE, RW, SHARED, 6, 0)),
    Attack("map huge pages", "mmap", (0, 2 << 20, RW, PRIVATE | ANON | 0x40000, -1, 0)),
    Attack("protect W+X", "mprotect", (0, PAGE, RWX)),
    Attack("protect X", "mprotect", (0, PAGE, RX)),
    Attack("pkey_mprotect W+X", "pkey_mprotect", (0, PAGE, RWX, -1)),
    *(Attack(f"madvise {a}", "madvise", (0, PAGE, a)) for a in (9, 12, 100, 101, 0x100000009)),
    Attack("memfd_create", "memfd_create", ("s:x", 0)),
    Attack("memfd_secret", "memfd_secret", (0,)),
    Attack("shmget", "shmget", (0, PAGE, 0o1600)),
    Attack("remap_file_pages", "remap_file_pages", (0, 0, 0, 0, 0)),
    Attack("mlock", "mlock", (0, PAGE)),
    Attack("userfaultfd", "userfaultfd", (0,), K),
]
KERNEL = [
    *(
        Attack(call, call, (0, 0, 0, 0, 0), K)
        for call in (
            "io_uring_setup",
            "io_uring_enter",
            "io_uring_register",
            "bpf",
            "keyctl",
            "perf_event_open",
            "add_key",
            "request_key",
            "init_module",
            "reboot",
            "iopl",
            "kexec_load",
            "open_by_handle_at",
            "clock_settime",
            "syslog",
        )
    ),
    *(Attack(f"futex {op}", "futex", (0, op, 0, 0, 0, 0)) for op in (2, 6, 7, 8, 11, 12, 13, 0x86)),
    Attack("futex_requeue", "futex_requeue", (0, 0, 0, 0)),
    *(
        Attack(f"fcntl {name}", "fcntl", (3, command, 1))
        for name, command in [
            ("SETOWN", 8),
            ("SETSIG", 10),
            ("SETLEASE", 1024),
            ("NOTIFY", 1026),
            ("SETPIPE_SZ", 1031),
            ("ADD_SEALS", 1033),
            ("SETOWN, high bits", 0x100000008),
        ]
    ),
    *(
        Attack(f"ioctl {name}", "ioctl", (0, command, 0))
        for name, command in [
            ("TIOCSTI", 0x5412),
            ("TIOCSTI, high bits", 0x100005412),
            ("TIOCLINUX", 0x541C),
            ("TIOCSCTTY", 0x540E),
            ("FIOASYNC", 0x5452),
        ]
    ),
    Attack("no such call", 999, (), N),
    Attack("call -1", -1, (), N),
    Attack("a call newer than the table", 470, (), N),
]
# by promise of the hostile suite (docs/hardening.md)
BY_PROMISE = {
    "P1": [*FILES, *MEMORY],
    "P2": PROCESSES,
    "P3": [*WEAKENING, *KERNEL],
    "P4": NETWORK,
}
ATTACKS = [attack for attacks in BY_PROMISE.values() for attack in attacks]


def on_sibling(pid: int, launcher: int) -> list[Attack]:
    """Against a sibling with this pid, and the launcher of both."""
    return [
        Attack("memory of a sibling", "openat", (-100, f"s:/proc/{pid}/mem", 0, 0), A),
        Attack("descriptors of a sibling", "openat", (-100, f"s:/proc/{pid}/fd/3", 0, 0), A),
        Attack("environment of a sibling", "openat", (-100, f"s:/proc/{pid}/environ", 0, 0), A),
        Attack("process_vm_readv of a sibling", "process_vm_readv", (pid, 0, 0, 0, 0, 0), K),
        Attack("kill a sibling", "kill", (pid, 9)),
        Attack("kill a sibling, high bits", "kill", (pid | 1 << 32, 9)),
        Attack("tgkill a sibling", "tgkill", (pid, pid, 9)),
        Attack("sigqueue to a sibling", "rt_sigqueueinfo", (pid, 9, 0)),
        Attack("sigqueue to its thread", "rt_tgsigqueueinfo", (pid, pid, 9, 0)),
        Attack("pidfd_open of a sibling", "pidfd_open", (pid, 0)),
        Attack("limits of a sibling", "prlimit64", (pid, 7, 0, 0)),
        Attack("ptrace of a sibling", "ptrace", (16, pid, 0, 0), K),
        Attack("kill the launcher", "kill", (launcher, 9)),
        Attack("memory of the launcher", "openat", (-100, f"s:/proc/{launcher}/mem", 0), A),
    ]


def outcome_of(out: str) -> str:
    """E, A or N, of what `call` printed; or what else it was."""
    if not re.fullmatch(r"-\d+\n", out):
        return f"it went through: {out!r}"
    code = -int(out)
    if code == errno.ENOENT:
        return A
    return E if code in REFUSED else N if code == errno.ENOSYS else os.strerror(code)
