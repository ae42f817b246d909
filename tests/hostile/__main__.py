"""`python -m tests.hostile`: makes every attack, prints what was expected and what came of it.

    --user root|plain   as one of them only (root can be both)
    --profile NAME      under this profile only
    --attack TEXT       those whose name holds this
    --quick             those of the test suite
    --json              a list of rows

Exit code 1 if one is not as expected, 2 if they were not all made.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Final

import msgspec

from piehost.host.sandbox import interpreters

from ..plain_user import USERS, under
from . import calls, exhaustion, protocol
from .arena import Arena, Row, arena
from .cases import PROFILES, Case, Live, call_case

# the suite makes every so many-th of the calls, and other profiles fewer of all
EVERY: Final = {"native": 12, "dynamic": 40, "python": 36, "node": 60, "perl": 60}
_PR_SET_PDEATHSIG: Final = 1
QUICK_PROFILES: Final = ("native", "python")
BROKE_OFF: Final = 2


def cases(live: Live) -> list[Case]:
    single = [call_case(promise, attack, False) for promise, attacks in calls.BY_PROMISE.items()
              for attack in attacks]  # fmt: skip
    sibling = [call_case("P2", attack, False) for attack in calls.on_sibling(*live)]
    return [*single, *sibling, *exhaustion.CASES, *protocol.CASES]


def chosen(made: Arena, profile: str, quick: bool, name: str) -> Iterator[Case]:
    """`quick` leaves out what comes to the same under another profile, or for another user."""
    live = made.live
    for number, case in enumerate(cases(live)):
        if name not in case.name:
            continue
        if quick and case.program == "call" and number % EVERY[profile] and not case.quick:
            continue
        if quick and case.program != "call" and (not case.quick or profile != "native"):
            continue
        if quick and case.program in ("octets", "ring") and made.user != USERS[0]:
            continue
        yield case


def attack(made: Arena, profiles: list[str], quick: bool, name: str) -> Iterator[Row]:
    for profile in profiles:
        for case in chosen(made, profile, quick, name):
            yield made.expect(case, profile)


def present(profiles: list[str]) -> list[str]:
    """Those whose interpreter is on this machine."""
    return [p for p in profiles if p not in ("node", "perl") or interpreters.locate(p)]


def die_with_parent() -> None:
    """SIGTERM when it is gone (prctl(2)): else a server and its programs would be left."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile")
    parser.add_argument("--user", choices=USERS, action="append")
    parser.add_argument("--profile", choices=PROFILES, action="append")
    parser.add_argument("--attack", default="")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--here", help=argparse.SUPPRESS)  # as whoever runs this, called so
    options = parser.parse_args()
    profiles = present(options.profile or list(QUICK_PROFILES if options.quick else PROFILES))
    if options.here:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # not without ending the server
        die_with_parent()
        with arena(options.here, profiles) as made:
            for row in attack(made, profiles, options.quick, options.attack):
                print(json.dumps(msgspec.to_builtins(row)), flush=True)
        return 0
    rows: list[Row] = []
    if not options.json:
        print(f"{'attack':52} {'':3} {'profile':8} {'user':6} {'expected':34} got")
    for user in options.user or USERS:
        for row in _rows(user, sys.argv[1:]):
            rows.append(row)
            if not options.json:
                print(
                    f"{row.attack[:52]:52} {row.promise:3} {row.profile:8} {row.user:6} "
                    f"{row.expected:34} {row.got}{'' if row.good else '   <-- NOT AS EXPECTED'}",
                    flush=True,
                )
    wrong = sum(not row.good for row in rows)
    if options.json:
        print(json.dumps(msgspec.to_builtins(rows), indent=1))
    else:
        slowest = max((row.host_ms for row in rows), default=0)
        grown = max((row.grown for row in rows), default=0)
        print(f"{len(rows)} attacks, {wrong} not as expected; the host's slowest answer took "
              f"{slowest:.0f} ms, host and controller grew by {grown >> 20} MiB")  # fmt: skip
    if not rows:
        print("no attack has that name", file=sys.stderr)
        return BROKE_OFF
    return int(wrong > 0)


def _rows(user: str, arguments: list[str]) -> Iterator[Row]:
    """From a process that `user` runs."""
    command = [*under(user), sys.executable, "-m", "tests.hostile", "--here", user, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            yield msgspec.json.decode(line, type=Row)
    finally:
        if process.wait() != 0:
            print(f"the attacks as {user} broke off", file=sys.stderr)
            sys.exit(BROKE_OFF)


if __name__ == "__main__":
    sys.exit(main())
