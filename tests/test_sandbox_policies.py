"""Each rule of each policy, carried out: what it allows goes through to the kernel, and with a bit
of an argument changed it goes through or not as the policy says.

The calls are made of the policies' files (`policy_oracle.py`). A process in the sandbox makes them
for us. Their arguments are such that the kernel finds them wrong, or nothing to do: a call that got
to it answers neither EPERM nor ENOSYS.
"""

from __future__ import annotations

import errno
import signal
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from .policy_oracle import ALLOW, AT_START, ENOSYS, EPERM, PROFILES, X86_64, Calls, Oracle
from .sandbox_harness import LauncherProcess, Outcome, Running, compile_c, launcher

ATTACKERS = Path(__file__).parent / "attackers"
NOWHERE = 0xFFFFFFFFFFFFFFFF  # no descriptor, no address, no clock
NR = Oracle("native").numbers
# the first argument is nowhere and the others are 0, but for these
ARGUMENTS = {
    "ppoll": (NOWHERE, 0, 1),  # without a time it would wait for ever
    "set_tid_address": (0,),
    "eventfd2": (0, NOWHERE),
}
# Linux 6.14 and later let it pass every filter, for probes put into a program from outside. Called
# by the program itself, it ends it with SIGILL.
PASSES = "uretprobe"
ENDS = {"exit": 7, "exit_group": 7, "rt_sigreturn": -signal.SIGSEGV}  # no frame to return to
AT_ONCE = 64

# a native program is run by the launcher for this profile as if it were its interpreter
AS_INTERPRETER = """
from piehost.host.sandbox import interpreters
interpreters.locate = lambda name: {program!r}
"""


class Call(NamedTuple):
    name: str
    arguments: tuple[int, ...]


class Caller:
    """A process in the sandbox that makes calls."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.pid = running.spawned().pid

    def results(self, calls: list[Call]) -> list[int]:
        """What each returned, or minus errno."""
        results: list[int] = []
        for first in range(0, len(calls), AT_ONCE):
            some = calls[first : first + AT_ONCE]
            wanted = b"".join(struct.pack("<7Q", NR[c.name], *c.arguments) for c in some)
            self.running.socket.sendall(wanted)
            answers = b""
            while len(answers) < 8 * len(some):
                try:
                    data = self.running.socket.recv(8 * len(some) - len(answers))
                except ConnectionResetError:  # it ended with calls still unread
                    data = b""
                assert data, f"{some[len(answers) // 8]} ended it: {self.running.outcome()}"
                answers += data
            results += [result for (result,) in struct.iter_unpack("<q", answers)]
        return results

    def last(self, call: Call) -> Outcome:
        """How it ends with this call."""
        self.running.socket.sendall(struct.pack("<7Q", NR[call.name], *call.arguments))
        back = self.running.socket.recv(8)
        assert not back, f"{call} came back: {struct.unpack('<q', back)}"
        return self.running.outcome()

    def end(self) -> Outcome:
        self.running.socket.shutdown(1)
        return self.running.outcome()


class Sandbox(NamedTuple):
    profile: str
    launcher: LauncherProcess
    program: Path

    def caller(self) -> Caller:
        kind = "python" if self.profile == "python" else "native"
        start = self.launcher.start(self.program, kind, profile=self.profile)
        return Caller(start)


@pytest.fixture(scope="module", params=PROFILES)
def sandbox(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sandbox]:
    profile = request.param
    if profile == "python":
        with launcher("--preload") as process:
            yield Sandbox(profile, process, ATTACKERS / "syscalls.py")
        return
    folder = tmp_path_factory.mktemp(profile)
    folder.chmod(0o755)
    options = ["-static"] if profile == "native" else []
    program = compile_c(ATTACKERS / "syscalls.c", folder, *options)
    with launcher(first=AS_INTERPRETER.format(program=str(program))) as process:
        yield Sandbox("native" if profile == "dynamic" else profile, process, program)


@pytest.fixture
def caller(sandbox: Sandbox) -> Iterator[Caller]:
    caller = sandbox.caller()
    yield caller
    if caller.running.socket.fileno() != -1:  # nothing ended it
        assert caller.end().code == 0


def oracle_of(request: pytest.FixtureRequest, caller: Caller) -> Oracle:
    return Oracle(request.node.callspec.params["sandbox"], {**AT_START, "pid": caller.pid})


def plain(name: str) -> tuple[int, ...]:
    given = ARGUMENTS.get(name, (NOWHERE,))
    return (*given, *[0] * (6 - len(given)))


def check(oracle: Oracle, caller: Caller, calls: list[Call]) -> dict[int, int]:
    """How many calls there were of each answer."""
    numbers = np.array([NR[call.name] for call in calls], np.uint32)
    given = np.array([call.arguments for call in calls], np.uint64).T
    answers = oracle.answers(Calls(numbers, np.full(len(calls), X86_64, np.uint32), given))
    for call, answer, result in zip(calls, answers, caller.results(calls), strict=True):
        said = f"{call.name}({', '.join(map(hex, call.arguments))}): {result}"
        if answer == ALLOW:
            assert result not in (-errno.EPERM, -errno.ENOSYS), f"{said}, and it is allowed"
        else:
            assert -result == answer & 0xFFFF, f"{said}, and it is to be {answer:#x}"
    return dict(Counter(answers.tolist()))


def test_what_needs_no_arguments_is_allowed_and_all_else_is_refused(
    request: pytest.FixtureRequest, caller: Caller
) -> None:
    oracle = oracle_of(request, caller)
    named = oracle.plain - oracle.when.keys() - ENDS.keys()
    answers = check(oracle, caller, [Call(name, plain(name)) for name in sorted(named)])
    assert answers == {ALLOW: len(named)}
    others = oracle.numbers.keys() - oracle.allowed() - oracle.forbidden - {PASSES}
    answers = check(oracle, caller, [Call(name, plain(name)) for name in sorted(others)])
    assert answers == {EPERM: len(others - oracle.absent), ENOSYS: len(others & oracle.absent)}


def test_each_rule_holds_to_the_bit(request: pytest.FixtureRequest, caller: Caller) -> None:
    """The launch itself was the call that the rule of execve allows: nobody else can make it."""
    oracle = oracle_of(request, caller)
    calls: dict[Call, None] = {}  # without repetitions, in order
    for name, arguments, named in oracle.fulfilled():
        if name == "execve":
            continue
        exact = list(plain(name))
        for index in named:
            exact[index] = arguments[index]
        calls[Call(name, tuple(exact))] = None
        for index in named:
            for bit in range(64):
                wrong = list(exact)
                wrong[index] ^= 1 << bit
                calls[Call(name, tuple(wrong))] = None
    answers = check(oracle, caller, list(calls))
    assert answers.keys() == {ALLOW, EPERM}
    assert min(answers.values()) > 100


def test_a_call_that_ends_its_caller_is_allowed(sandbox: Sandbox) -> None:
    for name, code in ENDS.items():
        outcome = sandbox.caller().last(Call(name, (7, 0, 0, 0, 0, 0)))
        assert outcome.code == code, name
        assert outcome.exited is not None and outcome.exited.violation is None


def test_a_forbidden_call_kills(request: pytest.FixtureRequest, sandbox: Sandbox) -> None:
    """All of them under `native`, a few under the others, since each takes a launch."""
    oracle = Oracle(request.node.callspec.params["sandbox"])
    assert len(oracle.forbidden) > 40
    for name in sorted(oracle.forbidden)[:: 1 if sandbox.profile == "native" else 11]:
        outcome = sandbox.caller().last(Call(name, plain(name)))
        assert outcome.code == -signal.SIGSYS, name
        assert outcome.exited is not None and outcome.exited.violation == name


def test_a_call_that_passes_every_filter_hurts_its_caller_alone(sandbox: Sandbox) -> None:
    caller = sandbox.caller()
    caller.running.socket.sendall(struct.pack("<7Q", NR[PASSES], *[0] * 6))
    if back := caller.running.socket.recv(8):  # an older kernel filters it
        assert struct.unpack("<q", back) == (-errno.EPERM,)
        assert caller.end().code == 0
    else:
        assert caller.running.outcome().code == -signal.SIGILL
    assert sandbox.caller().end().code == 0
