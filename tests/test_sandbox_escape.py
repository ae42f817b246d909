"""Escapes: each is attempted by real hostile code, native and Python, in the real sandbox.

E: refused with EPERM or EACCES. N: no such system call. K: killed, and the report names the call.
After every attack the launcher starts and reaps an honest program.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from piehost.host.sandbox import policy
from piehost.host.sandbox.launcher import UNNAMED

from .sandbox_harness import (
    ENVIRONMENT,
    LauncherProcess,
    Outcome,
    Running,
    compile_c,
    launcher,
)

ATTACKERS = Path(__file__).parent / "attackers"
POLICIES = policy.FOLDER
KINDS = ["native", "python"]
NR = policy.syscalls()

REFUSED = {errno.EPERM, errno.EACCES}
PAGE, ANON, SHARED, PRIVATE = 4096, 0x20, 1, 2
RWX, RX, RW = 7, 5, 3


class Attack(NamedTuple):
    name: str
    call: str | int
    arguments: tuple[int | str, ...] = ()
    expected: str = "E"


E, N, K = "E", "N", "K"
ATTACKS = [
    # network
    *(Attack(f"socket family {f}", "socket", (f, 1, 0)) for f in (1, 2, 10, 16, 17, 38, 40)),
    Attack("socket, high bits", "socket", (0x100000002, 1, 0)),
    Attack("connect", "connect", (3, "s:\x01\x00/tmp/socket", 20)),
    Attack("bind", "bind", (3, "s:\x01\x00/tmp/socket", 20)),
    Attack("listen", "listen", (3, 1)),
    Attack("accept", "accept4", (3, 0, 0, 0)),
    Attack("sendmsg (descriptors)", "sendmsg", (3, 0, 0)),
    Attack("recvmsg (descriptors)", "recvmsg", (3, 0, 0)),
    Attack("socketpair AF_INET", "socketpair", (2, 1, 0, 0)),
    Attack("sendto, an address", "sendto", (3, "s:x", 1, 0, "s:\x01\x00/tmp/s", 10)),
    Attack("sendto, out of band", "sendto", (3, "s:x", 1, 1, 0, 0)),
    # processes
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
    Attack("setsid", "setsid"),
    Attack("pidfd_open", "pidfd_open", (1, 0)),
    Attack("pidfd_getfd", "pidfd_getfd", (3, 0, 0), K),
    Attack("process_vm_writev", "process_vm_writev", (1, 0, 0, 0, 0, 0), K),
    Attack("raise own limit", "prlimit64", (0, 7, "s:\0" * 2, 0)),
    Attack("setrlimit", "setrlimit", (7, 0)),
    Attack("setuid", "setuid", (0,)),
    Attack("setpriority", "setpriority", (0, 0, -20)),
    Attack("sched_setscheduler", "sched_setscheduler", (0, 1, 0)),
    # own process: weakening it
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
    # files
    Attack("open /etc/shadow", "openat", (-100, "s:/etc/shadow", 0, 0)),
    Attack("open, old call", "open", ("s:/etc/shadow", 0, 0)),
    Attack("openat2", "openat2", (-100, "s:/etc/shadow", 0, 24)),
    Attack("open, dots", "openat", (-100, "s:/usr/lib/../../etc/shadow", 0, 0)),
    Attack("open /proc/self/environ", "openat", (-100, "s:/proc/self/environ", 0, 0)),
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
    # memory
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
    # the kernel
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


class Sandbox(NamedTuple):
    """A launcher of one kind, and the programs it runs."""

    kind: str
    launcher: LauncherProcess
    programs: dict[str, Path]

    def start(self, program: str, *arguments: int | str) -> Running:
        path = self.programs[program]
        return self.launcher.start(path, self.kind, argv=[str(path), *map(str, arguments)])

    def run(self, program: str, *arguments: int | str) -> Outcome:
        return self.start(program, *arguments).outcome()

    def attack(self, attack: Attack) -> Outcome:
        number = NR[attack.call] if isinstance(attack.call, str) else attack.call
        return self.run("call", number, *attack.arguments)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("attackers")
    sources = ("call", "inherited", "echo", "honest", "foreign")
    native = {name: compile_c(ATTACKERS / f"{name}.c", folder, "-static") for name in sources}
    python = {name: ATTACKERS / f"{name}.py" for name in ("call", "inherited", "echo", "honest")}
    return {"native": native, "python": python}


@pytest.fixture(scope="module")
def sandboxes(programs: dict[str, dict[str, Path]]) -> Iterator[dict[str, Sandbox]]:
    with launcher() as native, launcher("--preload") as zygote:
        yield {
            "native": Sandbox("native", native, programs["native"]),
            "python": Sandbox("python", zygote, programs["python"]),
        }


@pytest.fixture(params=KINDS)
def sandbox(request: pytest.FixtureRequest, sandboxes: dict[str, Sandbox]) -> Iterator[Sandbox]:
    chosen = sandboxes[request.param]
    yield chosen
    after = chosen.run("call", NR["getpid"])
    assert after.spawned is not None
    assert after.out == f"{after.spawned.pid}\n", "the launcher no longer answers properly"


def verdict(outcome: Outcome, call: str | int) -> str:
    """E, N or K, or what else came of it."""
    if outcome.exited is not None and outcome.exited.violation is not None:
        assert outcome.code == -signal.SIGSYS
        return K if outcome.exited.violation == call else f"killed for {outcome.exited.violation}"
    if re.fullmatch(r"-\d+\n", outcome.out):
        code = -int(outcome.out)
        return E if code in REFUSED else N if code == errno.ENOSYS else os.strerror(code)
    return f"it went through: {outcome.out!r} {outcome.err!r} {outcome.exited}"


def test_attacks_are_refused(sandbox: Sandbox) -> None:
    wrong = {}
    for attack in ATTACKS:
        got = verdict(sandbox.attack(attack), attack.call)
        if got != attack.expected:
            wrong[attack.name] = f"expected {attack.expected}, got {got}"
    assert not wrong


def test_inherits_exactly_its_descriptors_and_environment(sandbox: Sandbox) -> None:
    outcome = sandbox.run("inherited")
    fds, *environment = outcome.out.splitlines()
    assert fds.split() == [str(fd) for fd in range(8)]
    assert environment == [f"{name}={value}" for name, value in ENVIRONMENT.items()]


def test_a_sibling_is_out_of_reach(sandbox: Sandbox) -> None:
    victim = sandbox.start("echo")
    pid = victim.spawned().pid
    launcher_pid = sandbox.launcher.process.pid
    attacks = [
        Attack("memory", "openat", (-100, f"s:/proc/{pid}/mem", 0, 0)),
        Attack("descriptors", "openat", (-100, f"s:/proc/{pid}/fd/3", 0, 0)),
        Attack("environment", "openat", (-100, f"s:/proc/{pid}/environ", 0, 0)),
        Attack("process_vm_readv", "process_vm_readv", (pid, 0, 0, 0, 0, 0), K),
        Attack("kill", "kill", (pid, 9)),
        Attack("kill, high bits", "kill", (pid | 1 << 32, 9)),
        Attack("tgkill", "tgkill", (pid, pid, 9)),
        Attack("sigqueue", "rt_sigqueueinfo", (pid, 9, 0)),
        Attack("sigqueue a thread", "rt_tgsigqueueinfo", (pid, pid, 9, 0)),
        Attack("pidfd_open", "pidfd_open", (pid, 0)),
        Attack("prlimit", "prlimit64", (pid, 7, 0, 0)),
        Attack("ptrace", "ptrace", (16, pid, 0, 0), K),
        Attack("kill the launcher", "kill", (launcher_pid, 9)),
        Attack("launcher's memory", "openat", (-100, f"s:/proc/{launcher_pid}/mem", 0)),
    ]
    got = {attack.name: verdict(sandbox.attack(attack), attack.call) for attack in attacks}
    assert got == {attack.name: attack.expected for attack in attacks}
    victim.socket.sendall(b"still there?")
    assert victim.socket.recv(100) == b"still there?"
    victim.socket.shutdown(1)
    assert victim.outcome().code == 0


@pytest.mark.parametrize("architecture", ["i386", "x32"])
def test_calls_of_another_architecture_kill(
    sandboxes: dict[str, Sandbox], architecture: str
) -> None:
    outcome = sandboxes["native"].run("foreign", architecture)
    assert outcome.code == -signal.SIGSYS and outcome.out == ""
    assert outcome.exited is not None and outcome.exited.violation == UNNAMED


def test_a_thread_that_makes_a_forbidden_call_ends_its_process(
    sandboxes: dict[str, Sandbox], tmp_path: Path
) -> None:
    script = tmp_path / "thread.py"
    script.write_text(
        "import ctypes, threading, time\n"
        f"call = lambda: ctypes.CDLL(None).syscall({NR['bpf']}, 0, 0, 0)\n"
        "threading.Thread(target=call).start()\n"
        "time.sleep(60)\n"
    )
    outcome = sandboxes["python"].launcher.run(script, "python")
    assert outcome.code == -signal.SIGSYS
    assert outcome.exited is not None and outcome.exited.violation == "bpf"


def test_honest_programs_run(sandbox: Sandbox) -> None:
    running = sandbox.start("honest")
    outcome = running.outcome()
    assert running.ring_in.read(65530, 6) == b"inside"
    assert (outcome.out, outcome.err, outcome.code) == ("honest\n", "", 7)


def test_a_dynamically_linked_program_runs_and_is_held(
    sandboxes: dict[str, Sandbox], tmp_path: Path
) -> None:
    native = sandboxes["native"]
    for name in ("honest", "call", "inherited"):
        native.programs[f"dynamic {name}"] = compile_c(ATTACKERS / f"{name}.c", tmp_path)
    honest = native.start("dynamic honest")
    assert honest.outcome().code == 7 and honest.ring_in.read(65530, 6) == b"inside"
    fds = native.run("dynamic inherited").out.splitlines()[0]
    assert fds.split() == [str(fd) for fd in range(8)]
    wrong = {}
    for attack in ATTACKS:
        number = NR[attack.call] if isinstance(attack.call, str) else attack.call
        got = verdict(native.run("dynamic call", number, *attack.arguments), attack.call)
        if got != attack.expected:
            wrong[attack.name] = f"expected {attack.expected}, got {got}"
    assert not wrong


def test_a_second_linker_in_the_headers_grants_nothing(
    sandboxes: dict[str, Sandbox], tmp_path: Path
) -> None:
    """The kernel takes the first; the second names what the program would like to read."""
    program = compile_c(ATTACKERS / "call.c", tmp_path)
    image = bytearray(program.read_bytes())
    (table,) = struct.unpack_from("<Q", image, 32)
    (count,) = struct.unpack_from("<H", image, 56)
    note = max(at for at in range(table, table + 56 * count, 56) if image[at] == 4)  # PT_NOTE
    struct.pack_into("<IIQQQQQQ", image, note, 3, 4, len(image), 0, 0, 2, 2, 1)  # PT_INTERP
    program.write_bytes(image + b"/\0")
    native = sandboxes["native"]
    native.programs["two linkers"] = program
    outcome = native.run("two linkers", NR["openat"], -100, "s:/etc/shadow", 0, 0)
    assert outcome.out == f"{-errno.EACCES}\n"


def test_has_no_capabilities(sandbox: Sandbox) -> None:
    """Root's neither, if piehost runs as root."""
    running = sandbox.start("echo")
    status = Path(f"/proc/{running.spawned().pid}/status").read_text()
    sets = dict(re.findall(r"^Cap(Inh|Prm|Eff|Amb):\t(\w+)", status, re.MULTILINE))
    assert {int(held, 16) for held in sets.values()} == {0} and len(sets) == 4
    running.socket.shutdown(1)
    assert running.outcome().code == 0


# (file, text, sabotaged text, the attack that must no longer be refused as it was)
SABOTAGE = [
    ("native", '"getrandom",', '"getrandom", "socket",', "socket family 2"),
    ("native", '"getrandom",', '"getrandom", "kill",', "kill everything"),
    ("native", '"getrandom",', '"getrandom", "memfd_create",', "memfd_create"),
    ("native", "0xFFFFFFFC", "0xFFFFFFF8", "map W+X"),
    ("native", "mask = 0x4212F, in = [1]", "mask = 0x4210F, in = [1]", "map shared memory"),
    ("native", "16] }]]", "16, 9] }]]", "madvise 9"),
    ("native", "[0x3D0F00, 0x7D0F00], wide", "[0x3D0F00, 0x7D0F00, 17], wide", "clone, no thread"),
    ("native", "[0x3D0F00, 0x7D0F00], wide = true", "[0x3D0F00]", "clone, high bits"),
    ("native", "1030, 1034]", "1030, 1034, 8]", "fcntl SETOWN"),
    ("native", "0x5450]", "0x5450, 0x5412]", "ioctl TIOCSTI, high bits"),
    ("native", "4, 5, 9, 10]", "4, 5, 9, 10, 6]", "futex 6"),
    ("native", "[15, 16,", "[4, 15, 16,", "prctl DUMPABLE"),
    ("common", '"ptrace", ', "", "ptrace"),
    ("common", '"bpf", ', "", "bpf"),
    ("common", '"clone3", ', "", "clone3"),
    ("common", '"execve", ', "", "execve"),
]


@pytest.mark.parametrize(("file", "text", "sabotaged", "name"), SABOTAGE)
def test_a_missing_rule_is_noticed(
    programs: dict[str, dict[str, Path]],
    tmp_path: Path,
    file: str,
    text: str,
    sabotaged: str,
    name: str,
) -> None:
    folder = shutil.copytree(POLICIES, tmp_path / "policies")
    source = (folder / f"{file}.toml").read_text()
    assert text in source
    (folder / f"{file}.toml").write_text(source.replace(text, sabotaged))
    attack = next(attack for attack in ATTACKS if attack.name == name)
    first = (
        "import pathlib, piehost.host.sandbox.policy as p\n"
        f"p.FOLDER = pathlib.Path({str(folder)!r})"
    )
    with launcher(first=first) as process:
        sandbox = Sandbox("native", process, programs["native"])
        assert verdict(sandbox.attack(attack), attack.call) != attack.expected


def test_the_names_of_forbidden_calls_do_not_guard(
    programs: dict[str, dict[str, Path]],
) -> None:
    """Without the watching filter the calls kill all the same, only nameless."""
    first = (
        "import piehost.host.sandbox.start as s\n"
        "def none(): raise OSError(16, 'a listener is above this process')\n"
        "s.Watch = none"
    )
    with launcher(first=first) as process:
        outcome = process.run(
            programs["native"]["call"], argv=["call", str(NR["ptrace"]), "16", "1"]
        )
    assert outcome.code == -signal.SIGSYS and outcome.out == ""
    assert outcome.exited is not None and outcome.exited.violation == UNNAMED


def test_landlock_alone_keeps_files_shut(tmp_path: Path) -> None:
    """A script may open what it is granted and nothing else, whatever way the path goes."""
    granted, secret = tmp_path / "granted", tmp_path / "secret.txt"
    granted.mkdir()
    (granted / "own.txt").write_text("own")
    secret.write_text("secret")
    (granted / "symlink").symlink_to(secret)
    os.link(secret, tmp_path / "hardlink")
    (granted / "main.py").write_text(
        "import os\n"
        "def attempt(path, flags=os.O_RDONLY):\n"
        "    try: return os.read(os.open(path, flags), 10).decode()\n"
        "    except OSError as error: return error.errno\n"
        "print([attempt(p) for p in ('own.txt', 'symlink', '../secret.txt', '../hardlink')])\n"
        "print(attempt('/etc/passwd'), attempt('/proc/self/maps'), attempt('/'))\n"
    )
    with launcher("--preload") as process:
        outcome = process.run(
            granted / "main.py", "python", readable=[str(granted)], cwd=str(granted)
        )
    denied = errno.EACCES
    assert outcome.out == f"['own', {denied}, {denied}, {denied}]\n{denied} {denied} {denied}\n"
