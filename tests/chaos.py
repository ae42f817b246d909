"""Random faults under load: `python -m tests.chaos SECONDS [--seed N] [--model M]`.

Launches inferlets without pause and kills or stops every kind of process at random points. Each
launch must end with its right output or a typed error, the latter only if it names a process that
it depends on and that was hurt while it ran; afterwards nothing may be left of all that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

import psutil
from msgspec import Struct

from piehost.host.client import Client, Result, Run, connect
from piehost.host.errors import FailedAnswer, HostError
from piehost.wire.client import Reason

from .host_harness import SMALL, Terminal, all_gone, eventually, family, new_terminal
from .hostile.counters import control_groups
from .raw_inferlet import write_raw

ROOT = Path(__file__).parent.parent
HANG = 120.0  # seconds without a fault, after which whatever has not ended hangs
WHOLE = 1.0  # seconds that a process goes on after a stop: the watchdog has not ended it, then
AT_ONCE = 12
PROMPTS = ("The capital of France is", "One two three", "hello", "To be or not")
LENGTHS = (4, 32, 200)
CORE = ("backend", "controller")
OURS = (*CORE, "launcher", "zygote", "store", "egress")
# what an inferlet of each kind cannot do without
NEEDS = {
    "python": {*CORE, "zygote"},
    "c": {*CORE, "launcher"},
    "echo": {*CORE, "zygote"},
    "services": {*CORE, "zygote"},  # it expects that the services fail
}
ECHO = """
    while True:
        try:
            data = ask(RECEIVE)
        except Failed:  # all has come
            break
        say(data.decode())
"""
SERVICES = """
    held = None
    for number in range(30):
        for op, fields in ((STORE_SET, ("k", b"%d" % number)), (STORE_GET, ("k",))):
            try:
                value = ask(op, *fields)
            except Failed as failed:
                assert failed.code == 17, failed  # unavailable
                held = None
            else:
                held = b"%d" % number if op == STORE_SET else held
                assert op == STORE_SET or held in (None, value), (held, value)
    assert failure(HTTP_GET, 1, "http://127.0.0.1:9/") == 17, "it is granted, and nobody listens"
    say("served")
"""


class Fault(Struct, eq=False):
    """Something that was hurt, until it was whole again."""

    target: str  # name of a process, or id of an inferlet
    pid: int
    killed: bool  # else stopped
    began: float
    resumed: float = float("inf")
    healed: float = float("inf")


class Launched(Struct, eq=False):
    kind: str
    run: Run
    expected: str
    began: float


class Chaos:
    """One server, its load and its faults."""

    def __init__(
        self, terminal: Terminal, client: Client, host: int, seed: int, folder: Path, model: str
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._client = client
        self._host = host
        self._random = random.Random(seed)
        self._faults: list[Fault] = []
        self._running: list[Launched] = []
        self._resume_at: deque[tuple[float, Fault]] = deque()
        self._model = model
        self._programs = {
            "python": ROOT / "inferlets" / "text_completion",
            "c": ROOT / "inferlets" / "c" / "text_completion",
            "echo": write_raw(folder, "echo.py", ECHO),
            "services": write_raw(folder, "services.py", SERVICES),
        }
        self._texts: dict[tuple[str, int], str] = {}

    # --- load ----------------------------------------------------------------------------------

    def learn(self) -> None:
        """What each prompt gives, undisturbed; and that both languages give the same."""
        for prompt in PROMPTS:
            for length in LENGTHS:
                texts = {self._complete(kind, prompt, length).result(HANG).text for kind in NEEDS
                         if kind in ("python", "c")}  # fmt: skip
                assert len(texts) == 1, texts
                self._texts[prompt, length] = texts.pop()
        for kind in ("echo", "services"):
            launched = self._launch(kind)
            assert launched.run.result(HANG).text == launched.expected

    def _complete(self, kind: str, prompt: str, length: int) -> Run:
        arguments = ["--prompt", prompt, "--max-tokens", str(length)]
        return self._client.launch(self._programs[kind], arguments)

    def _launch(self, kind: str) -> Launched:
        began = time.monotonic()
        if kind == "echo":
            run = self._client.launch(self._programs[kind])
            words = [str(self._random.random()) for _ in range(self._random.randint(0, 50))]
            for word in words:
                run.send(word.encode())
            run.close_input()
            return Launched(kind, run, "".join(words), began)
        if kind == "services":
            user = str(self._random.getrandbits(64))
            run = self._client.launch(self._programs[kind], user=user, egress=["127.0.0.1:9"])
            return Launched(kind, run, "served", began)
        prompt, length = self._random.choice(PROMPTS), self._random.choice(LENGTHS)
        expected = self._texts[prompt, length]
        return Launched(kind, self._complete(kind, prompt, length), expected, began)

    def _check(self, one: Launched) -> None:
        """It is over: was that right?"""
        hurt = self._hurt_since(one.began)
        touched = bool({*NEEDS[one.kind], one.run.id} & {fault.target for fault in hurt})
        self.counts["touched" if touched else "untouched"] += 1
        try:
            result = one.run.result(0)
        except FailedAnswer as failed:
            typed = explained(one, failed.reason, hurt)
            what = f"refused: {failed.reason}"
        else:
            if result.code == 0 and result.reason is None and result.text == one.expected:
                self.counts["right"] += 1
                return
            typed = result.code != 0 and (
                explained(one, result.reason, hurt)
                if result.reason is not None
                else told_of_the_backend(result, hurt)
            )
            words = result.stderr[-600:].decode(errors="replace")
            what = f"{result.code} {result.reason} {result.text!r} {words}"
        self.counts["typed" if typed else "wrong"] += 1
        if not typed:
            names = sorted(fault.target for fault in hurt)
            self.wrong.append(
                f"{one.kind} {one.run.id}: {what}, expected {one.expected!r}; hurt: {names}"
            )

    def _hurt_since(self, began: float) -> list[Fault]:
        return [fault for fault in self._faults if fault.healed >= began]

    # --- faults --------------------------------------------------------------------------------

    def _hurt(self) -> None:
        children = self._client.stats().children
        ready = self._client.models().model is not None
        targets: list[tuple[str, int]] = [("host", self._host)]
        targets += [(n, p) for n, p in children.items() if ready or n not in CORE]
        targets += [(one.run.id, one.run.pid) for one in self._running if one.run.pid][:4]
        broken = {fault.target for fault in self._faults if fault.healed == float("inf")}
        targets = [target for target in targets if target[0] not in broken]
        name, pid = self._random.choice(targets)
        kill = name != "host" and self._random.random() < 0.5
        fault = Fault(name, pid, kill, time.monotonic())
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if kill else signal.SIGSTOP)
            self._faults.append(fault)
            what = name if name in (*children, "host") else "inferlet"
            self.counts[f"{'kill' if kill else 'stop'} {what}"] += 1
            if name == "host":  # nobody else would let it go on
                time.sleep(self._random.uniform(0, 1.0))
                os.kill(pid, signal.SIGCONT)
                fault.healed = time.monotonic()
            elif not kill:  # some go on in time, some the watchdog ends
                until = time.monotonic() + self._random.uniform(0, 4.0)
                self._resume_at.append((until, fault))

    def _resume(self) -> None:
        for at, fault in list(self._resume_at):
            if at <= time.monotonic():
                self._resume_at.remove((at, fault))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(fault.pid, signal.SIGCONT)
                    fault.resumed = time.monotonic()
                    if fault.target not in self._client.stats().children:
                        fault.healed = time.monotonic()

    def _heal(self) -> None:
        """Notes which of our own processes are whole again."""
        open_faults = [f for f in self._faults if f.healed == float("inf") and f.target in OURS]
        if not open_faults:
            return
        children = self._client.stats().children
        now = time.monotonic()
        for fault in open_faults:
            replaced = children.get(fault.target, fault.pid) != fault.pid
            goes_on = now - fault.resumed > WHOLE and not process_is_dead(fault.pid)
            if replaced or goes_on:
                fault.healed = now

    # --- the run -------------------------------------------------------------------------------

    def run(self, seconds: float, pause: float) -> None:
        """`pause`: seconds from one fault to the next, on average."""
        end = time.monotonic() + seconds
        next_fault = time.monotonic() + pause
        while time.monotonic() < end or self._running:
            self._heal()  # else what is launched next could blame a fault that is over
            while time.monotonic() < end and len(self._running) < AT_ONCE:
                self.counts["launched"] += 1
                self._running.append(self._launch(self._random.choice(list(NEEDS))))
            self._client.pump(0.02)
            self._resume()
            for one in [one for one in self._running if one.run.over]:
                self._running.remove(one)
                self._check(one)
            if next_fault <= time.monotonic() < end:
                self._hurt()
                next_fault = time.monotonic() + self._random.expovariate(1 / pause)
            last = max((f.began for f in self._faults), default=0.0)
            for one in self._running:
                if time.monotonic() - max(one.began, last) > HANG:
                    states = [f"{p.name()} {p.status()}" for p in family(self._host)]
                    raise AssertionError(f"{one.kind} {one.run.id} hangs; {states}; {self.wrong}")
        while self._resume_at:
            self._resume()
            time.sleep(0.05)


def explained(one: Launched, reason: Reason, hurt: list[Fault]) -> bool:
    """Whether one of the faults is what the reason says: it names what was hurt, and only what the
    inferlet cannot do without."""
    if reason.code == "signal":
        return any(fault.target == one.run.id and fault.killed for fault in hurt)
    named = {
        "backend_lost": "backend",
        "controller_lost": "controller",
        "launcher_lost": "launcher" if one.kind == "c" else "zygote",
    }.get(reason.code)
    return named is not None and any(fault.target == named for fault in hurt)


def told_of_the_backend(result: Result, hurt: list[Fault]) -> bool:
    """Whether it ended by itself because its commands had failed with `backend`, as they had to."""
    told = b"the backend process is gone" in result.stderr and b"Traceback" not in result.stderr
    return told and any(fault.target == "backend" for fault in hurt)


def process_is_dead(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def is_in_use(group: Path) -> bool:
    try:
        return bool((group / "cgroup.procs").read_text())
    except OSError:  # it is removed just now
        return False


def counters(client: Client, host: int) -> dict[str, int]:
    """What must be as before when nothing runs: descriptors, processes, pages, rings, groups."""
    stats = client.stats()
    children = stats.children
    backend = Path(f"/proc/{children['backend']}/maps").read_text().splitlines()
    rings = sum("piehost-ring-out" in line for line in backend)
    services = sum(name in children for name in ("store", "egress"))  # started when called
    return {
        "processes": len(family(host)) - services,
        "host descriptors": len(os.listdir(f"/proc/{host}/fd")) - 2 * stats.rings_ready - services,
        "launcher descriptors": len(os.listdir(f"/proc/{children['launcher']}/fd")),
        "zygote descriptors": len(os.listdir(f"/proc/{children['zygote']}/fd")),
        "rings mapped and not ready": rings - stats.rings_ready,
        "pages held": stats.controller.pages_total - stats.controller.pages_free,
        "rows held": stats.controller.rows_total - stats.controller.rows_free,
        "seats": stats.controller.seats,
        "processes in groups": sum(
            is_in_use(group) for group in control_groups(host) if group.name.isdigit()
        ),
    }


@contextlib.contextmanager
def serving(terminal: Terminal, model: str) -> Iterator[tuple[Client, int]]:
    """A server whose words are kept, and a client of it. When it is killed nothing is left."""
    process = terminal.start("serve", *SMALL, "--model", model)
    assert process.stdout is not None and process.stderr is not None
    said: deque[bytes] = deque(maxlen=100)
    drain = threading.Thread(target=said.extend, args=(process.stderr,))
    drain.start()
    everyone: list[psutil.Process] = []
    try:
        assert process.stdout.readline().startswith(b"piehost: serving"), said
        with connect(str(terminal.socket)) as client:
            yield client, process.pid
            everyone = family(process.pid)
            process.kill()
            process.wait()
            try:
                client.stats()
            except HostError as error:
                assert error.reason.code == "host_lost", error
        assert eventually(lambda: all_gone(everyone)), everyone
    except BaseException:
        print(b"".join(said).decode(errors="replace"), file=sys.stderr)
        raise
    finally:
        for left in everyone or family(process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()
        drain.join()


def run(seconds: float, seed: int, model: str, pause: float) -> Counter[str]:
    """AssertionError says what went wrong."""
    subprocess.run(["make", "-s", "-C", ROOT / "inferlets" / "c"], check=True)
    with new_terminal() as terminal, serving(terminal, model) as (client, host):
        chaos = Chaos(terminal, client, host, seed, terminal.directory, model)
        chaos.learn()
        seen: deque[dict[str, int]] = deque(maxlen=4)

        def at_rest() -> bool:
            seen.append(counters(client, host))
            coming = seen[-1]["rings mapped and not ready"]
            return not coming and len(seen) == 4 and all(count == seen[-1] for count in seen)

        assert eventually(at_rest), f"the counters never rest: {seen}"
        before = seen[-1]
        chaos.run(seconds, pause)
        assert not chaos.wrong, "\n".join(chaos.wrong)
        assert eventually(lambda: client.models().model is not None, HANG)
        chaos.learn()  # all works again
        after: dict[str, int] = {}

        def settled() -> bool:
            nonlocal after
            after = counters(client, host)
            return after == before

        assert eventually(settled), (before, after)
        chaos.counts["restarts"] = client.stats().restarts
    return chaos.counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="chaos")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--model", default="scripted")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between faults, mean")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    counts = run(options.seconds, options.seed, options.model, options.pause)
    print(json.dumps(dict(sorted(counts.items())), indent=1))


if __name__ == "__main__":
    main()
