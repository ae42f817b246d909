"""Escapes: each is attempted by real hostile code, native and Python, in the real sandbox.

All is done under a launcher of root's and under one of a plain user's;
after every attack it starts and reaps an honest program.
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

from .hostile.calls import ATTACKS, NR, A, Attack, E, K, N, on_sibling, outcome_of
from .plain_user import USERS, under
from .sandbox_harness import (
    ENVIRONMENT,
    LauncherProcess,
    Outcome,
    Running,
    compile_c,
    launcher,
    without,
)

ATTACKERS = Path(__file__).parent / "attackers"
POLICIES = policy.FOLDER
KINDS = ["native", "python"]


class Sandbox(NamedTuple):
    """A launcher of one kind, and the programs it runs."""

    user: str
    kind: str
    launcher: LauncherProcess
    programs: dict[str, Path]

    def start(self, program: str, *arguments: int | str) -> Running:
        path = self.programs[program]
        return self.launcher.start(path, self.kind, argv=[str(path), *map(str, arguments)])

    def run(self, program: str, *arguments: int | str) -> Outcome:
        return self.start(program, *arguments).outcome()

    def attack(self, attack: Attack) -> Outcome:
        return self.run("call", attack.number, *attack.arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attackers")
    folder.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def programs(folder: Path) -> dict[str, dict[str, Path]]:
    sources = ("call", "inherited", "echo", "honest", "foreign")
    native = {name: compile_c(ATTACKERS / f"{name}.c", folder, "-static") for name in sources}
    python = {name: ATTACKERS / f"{name}.py" for name in ("call", "inherited", "echo", "honest")}
    return {"native": native, "python": python}


@pytest.fixture(scope="module", params=USERS)
def sandboxes(
    request: pytest.FixtureRequest, programs: dict[str, dict[str, Path]], folder: Path
) -> Iterator[dict[str, Sandbox]]:
    user = request.param
    become = under(user, folder)
    with launcher(under=become) as native, launcher("--preload", under=become) as zygote:
        yield {
            "native": Sandbox(user, "native", native, programs["native"]),
            "python": Sandbox(user, "python", zygote, programs["python"]),
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
    got = outcome_of(outcome.out)
    if got in (E, A, N) or not got.startswith("it went through"):
        return got
    return f"{got} {outcome.err!r} {outcome.exited}"


def unexpected(attack: Attack, profile: str, outcome: Outcome) -> str:
    """What came of the attack, if that is not what had to."""
    got = verdict(outcome, attack.call)
    assert outcome.spawned is not None
    expected = attack.expected_under(profile, hides=not outcome.spawned.sees_all)
    return "" if got == expected else f"expected {expected}, got {got}"


def unexpected_of(attacks: list[Attack], sandbox: Sandbox) -> dict[str, str]:
    """By name."""
    came = {a.name: unexpected(a, sandbox.kind, sandbox.attack(a)) for a in attacks}
    return {name: what for name, what in came.items() if what}


def test_attacks_are_refused(sandbox: Sandbox) -> None:
    assert unexpected_of(ATTACKS, sandbox) == {}


def test_inherits_exactly_its_descriptors_and_environment(sandbox: Sandbox) -> None:
    outcome = sandbox.run("inherited")
    fds, *environment = outcome.out.splitlines()
    assert fds.split() == [str(fd) for fd in range(8)]
    assert environment == [f"{name}={value}" for name, value in ENVIRONMENT.items()]


def test_a_sibling_is_out_of_reach(sandbox: Sandbox) -> None:
    victim = sandbox.start("echo")
    pid = victim.spawned().pid
    launcher_pid = sandbox.launcher.process.pid
    attacks = on_sibling(pid, launcher_pid)
    assert unexpected_of(attacks, sandbox) == {}
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
    sandboxes: dict[str, Sandbox], folder: Path
) -> None:
    script = folder / "thread.py"
    script.write_text(
        "import ctypes, threading, time\n"
        f"call = lambda: ctypes.CDLL(None).syscall({NR['bpf']}, 0, 0, 0)\n"
        "threading.Thread(target=call).start()\n"
        "time.sleep(60)\n"
    )
    outcome = sandboxes["python"].launcher.run(script, "python")
    assert outcome.code == -signal.SIGSYS
    assert outcome.exited is not None and outcome.exited.violation == "bpf"


def test_the_launchers_way_past_the_watch_leads_a_script_nowhere(
    sandboxes: dict[str, Sandbox], folder: Path
) -> None:
    """It finds the number in the memory it shares with the zygote, and has its own filter still."""
    script = folder / "passage.py"
    numbers = [NR[name] for name in ("unshare", "mount", "setns", "ptrace")]
    script.write_text(
        "import ctypes, sys\n"
        "passage = sys.modules['piehost.host.sandbox.calls'].PASSAGE\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        f"for number in {numbers}:\n"
        "    result = libc.syscall(number, 0, 0, 0, 0, 0, ctypes.c_ulong(passage))\n"
        "    print(result, ctypes.get_errno())\n"
    )
    outcome = sandboxes["python"].launcher.run(script, "python")
    assert outcome.out == f"-1 {errno.ENOSYS}\n" * len(numbers), outcome.err


def test_honest_programs_run(sandbox: Sandbox) -> None:
    running = sandbox.start("honest")
    outcome = running.outcome()
    assert running.ring_in.read(65530, 6) == b"inside"
    assert (outcome.out, outcome.err, outcome.code) == ("honest\n", "", 7)


def test_a_dynamically_linked_program_runs_and_is_held(
    sandboxes: dict[str, Sandbox], folder: Path
) -> None:
    native = sandboxes["native"]
    place = folder / f"dynamic-{native.user}"
    place.mkdir(mode=0o755)
    for name in ("honest", "call", "inherited"):
        native.programs[f"dynamic {name}"] = compile_c(ATTACKERS / f"{name}.c", place)
    honest = native.start("dynamic honest")
    assert honest.outcome().code == 7 and honest.ring_in.read(65530, 6) == b"inside"
    fds = native.run("dynamic inherited").out.splitlines()[0]
    assert fds.split() == [str(fd) for fd in range(8)]
    wrong = {}
    for attack in ATTACKS:
        outcome = native.run("dynamic call", attack.number, *attack.arguments)
        if what := unexpected(attack, "dynamic", outcome):
            wrong[attack.name] = what
    assert not wrong


def test_a_second_linker_in_the_headers_grants_nothing(
    sandboxes: dict[str, Sandbox], folder: Path
) -> None:
    """The kernel takes the first; the second names what the program would like to read."""
    native = sandboxes["native"]
    place = folder / f"linkers-{native.user}"
    place.mkdir(mode=0o755)
    program = compile_c(ATTACKERS / "call.c", place)
    image = bytearray(program.read_bytes())
    (table,) = struct.unpack_from("<Q", image, 32)
    (count,) = struct.unpack_from("<H", image, 56)
    note = max(at for at in range(table, table + 56 * count, 56) if image[at] == 4)  # PT_NOTE
    struct.pack_into("<IIQQQQQQ", image, note, 3, 4, len(image), 0, 0, 2, 2, 1)  # PT_INTERP
    program.write_bytes(image + b"/\0")
    native.programs["two linkers"] = program
    outcome = native.run("two linkers", NR["openat"], -100, "s:/", 0, 0)
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
    ("native", "9, 10, 0x109]", "9, 10, 0x109, 6]", "futex 6"),
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
        sandbox = Sandbox(USERS[0], "native", process, programs["native"])
        outcome = sandbox.attack(attack)
        assert outcome.spawned is not None, "the sabotage is another one: nothing starts"
        assert verdict(outcome, attack.call) != attack.expected


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
    with launcher("--preload", first=without("mount")) as process:
        outcome = process.run(
            granted / "main.py",
            "python",
            readable=[str(granted)],
            cwd=str(granted),
            waived=["identity"],  # its user could not pass the folders above
        )
    denied = errno.EACCES
    assert outcome.out == f"['own', {denied}, {denied}, {denied}]\n{denied} {denied} {denied}\n"


def test_the_mount_namespace_alone_keeps_files_shut(tmp_path: Path) -> None:
    """Where Landlock does not exist there is nothing to open but what was granted, and that may
    not be written."""
    tmp_path.chmod(0o755)
    granted, secret = tmp_path / "granted", tmp_path / "secret.txt"
    granted.mkdir()
    (granted / "own.txt").write_text("own")
    (granted / "own.txt").chmod(0o666)
    secret.write_text("secret")
    (granted / "symlink").symlink_to(secret)
    (granted / "main.py").write_text(
        "import os\n"
        "def attempt(path, flags=os.O_RDONLY):\n"
        "    try: return os.read(os.open(path, flags), 10).decode()\n"
        "    except OSError as error: return error.errno\n"
        "paths = ('own.txt', 'symlink', '../secret.txt', '/etc/passwd', '/proc/self/maps')\n"
        "print([attempt(p) for p in paths], attempt('own.txt', os.O_RDWR))\n"
        "print(sorted(os.listdir('/etc')), 'proc' in os.listdir('/'))\n"
    )
    with launcher("--preload", first=without("landlock_create_ruleset", "seccomp")) as process:
        outcome = process.run(
            granted / "main.py",
            "python",
            readable=[str(granted)],
            cwd=str(granted),
            waived=["landlock", "seccomp"],
        )
    opened, listed = outcome.out.splitlines()
    assert opened == f"['own', {', '.join([str(errno.ENOENT)] * 4)}] {errno.EROFS}"
    assert listed == "['alternatives', 'ld.so.cache'] False"
