"""A real server, an honest inferlet on it, and the attacks that are made beside that."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from msgspec import Struct

from piehost.host.cgroups import Missing, detect
from piehost.host.client import Client, Run
from piehost.host.errors import FailedAnswer
from piehost.wire import client as wire

from ..cgroup_fixtures import fail_unless_lacking
from ..host_harness import SCRIPTED, Server, eventually, has_its_group, new_terminal
from .cases import Case, Live, judged
from .counters import counters, difference, resident
from .programs import Programs, build
from .protocol import WARM

END: Final = 90.0  # seconds; an attack that takes longer hangs
ANSWER: Final = 10.0  # seconds in which the host and the sibling must have answered
BLOAT: Final = 48 << 20  # octets that our processes may grow by, all attacks of a server together
SHARE_SECONDS: Final = 2.0


class Row(Struct):
    """A line of the table."""

    attack: str
    promise: str
    profile: str
    user: str
    expected: str
    got: str
    good: bool
    host_ms: float = 0.0  # how long the host took to answer afterwards
    grown: int = 0  # octets that host and controller had at most so far, beyond those at first


class Arena:
    """`expect` a case, and all that must hold after it."""

    def __init__(self, server: Server, client: Client, programs: Programs, user: str) -> None:
        self.client = client
        self._server = server
        self._programs = programs
        self.user = user
        found = detect(lambda call: call())
        self._cgroups = not isinstance(found, Missing)
        if isinstance(found, Missing):
            fail_unless_lacking(found)
        else:
            found.close()
        self._sibling = client.launch(programs.sibling)
        assert self._said(self._sibling, END), "the sibling does not start"
        details = client.inspect(self._sibling.id).details
        assert details is not None
        self._hides = "mounts" in details.controls
        self._text = self._round()
        self._before: dict[str, int] = {}
        self._resident = 0

    @property
    def live(self) -> Live:
        children = self.client.stats().children
        return Live(self._sibling.pid, children["launcher"])

    def settle(self, profiles: list[str]) -> None:
        """Every program ran once: what is kept for the next launch of one counts no more."""
        for profile in profiles:
            for program in self._programs.of(profile):
                path, words = self._programs.launch(profile, program, ("39",))
                self.client.launch(path, words).result(END)
        path, words = self._programs.launch(profiles[0], "octets", WARM)
        self.client.launch(path, words).result(END)
        self._round()
        seen: list[dict[str, int]] = []

        def still() -> bool:
            seen.append(self._counters())
            time.sleep(0.1)
            return len(seen) > 3 and all(count == seen[-1] for count in seen[-4:])

        assert eventually(still), f"the counters never rest: {seen[-3:]}"
        self._before = seen[-1]
        self._resident = self._most()

    def expect(self, case: Case, profile: str) -> Row:
        hidden = case.hidden if self._hides and profile != "native" else ""
        expected = case.on_profile.get(profile, hidden or case.expected)
        if case.cgroup and not self._cgroups:
            expected = case.cgroup
        if profile in case.not_on:
            why = f"not on {profile}: {case.not_on[profile]}"
            return Row(case.name, case.promise, profile, self.user, "-", why, True)
        seen = set()
        for words in case.variants or (case.words,):
            got = self._attack(case, profile, words)
            seen.add(got)
            if got != expected:
                seen = {f"{got} ({' '.join(map(str, words))[:60]!r})"} if case.variants else {got}
                break
        host_ms, wrong = self._after()
        grown = self._most() - self._resident
        if grown > BLOAT:
            wrong.append(f"our processes grew by {grown >> 20} MiB")
        got = " | ".join([*sorted(seen), *wrong])
        good = not wrong and seen == {expected}
        return Row(case.name, case.promise, profile, self.user, expected, got, good, host_ms, grown)

    # --- one attack ----------------------------------------------------------------------------

    def _attack(self, case: Case, profile: str, words: tuple[object, ...]) -> str:
        path, arguments = self._programs.launch(profile, case.program, words)
        runs = [self.client.launch(path, arguments, dict(case.quotas)) for _ in range(case.crowd)]
        try:
            if case.stays:
                wrong = self._while_it_runs(case.stays, runs)
                if wrong is not None:
                    return wrong
            ended = {judged(case, run.result(END)) for run in runs}
            return " and ".join(sorted(ended))
        except FailedAnswer as failed:
            return f"refused: {failed.reason.code}"
        except TimeoutError:
            return f"had not ended after {END:.0f} s"
        finally:
            left = [run for run in runs if not run.over]
            for run in left:
                run.cancel()
            for run in left:
                with contextlib.suppress(FailedAnswer):
                    run.result(END)

    def _while_it_runs(self, stays: str, runs: list[Run]) -> str | None:
        """What came of it; None: that is to be seen by its end."""
        for run in runs:
            while not run.id and not run.over:
                self.client.pump(END)
            if not run.id:
                run.take()  # FailedAnswer: it was refused
        if stays == "stopped":
            while not any(isinstance(event, wire.Output) for event in runs[0]._events):
                self.client.pump(END)
            self.client.stop(runs[0].id)
            return None
        if stays == "share":
            return self._share(runs[0])
        for _ in range(3):
            if (text := self._round()) != self._text:
                return f"its sibling said {text!r} meanwhile"
        over = [run for run in runs if run.over]
        return None if over else "held"

    def _share(self, run: Run) -> str:
        """Processor time by the clock: a slow machine can only make it less."""
        assert eventually(lambda: has_its_group(self.client, run)), "it is never moved to its group"
        began, used = time.monotonic(), self._used(run)
        time.sleep(SHARE_SECONDS)
        part = (self._used(run) - used) / (time.monotonic() - began)
        return "within its share" if part < 0.3 else f"had {part:.0%} of a processor"

    def _used(self, run: Run) -> float:
        return next(i.cpu_seconds for i in self.client.inferlets() if i.id == run.id)

    # --- what must hold afterwards -------------------------------------------------------------

    def _after(self) -> tuple[float, list[str]]:
        """Milliseconds until the host answered, and what is wrong."""
        wrong = []
        began = time.monotonic()
        self.client.inferlets()
        host_ms = (time.monotonic() - began) * 1000
        if host_ms > ANSWER * 1000:
            wrong.append(f"the host took {host_ms:.0f} ms")
        if (text := self._round()) != self._text:
            wrong.append(f"its sibling said {text!r}")
        if not eventually(lambda: self._counters() == self._before):
            now = self._counters()
            wrong.append(difference(self._before, now))
            self._before = now  # whoever comes next is not to blame
        return host_ms, wrong

    def _counters(self) -> dict[str, int]:
        return counters(self.client, self._server.process.pid)

    def _most(self) -> int:
        children = self.client.stats().children
        return resident([self._server.process.pid, children["controller"]])

    def _round(self) -> str | None:
        """What the sibling generates; None if it does not."""
        self._sibling.send(b"One two three")
        return self._said(self._sibling, ANSWER)

    def _said(self, run: Run, seconds: float) -> str | None:
        end = time.monotonic() + seconds
        while True:
            for event in run.take():
                if isinstance(event, wire.Message):
                    return event.data.decode()
                if isinstance(event, wire.Ended):
                    return f"ended: {event.reason}"
            left = end - time.monotonic()
            if left <= 0:
                return None
            self.client.pump(left)


@contextlib.contextmanager
def arena(user: str, profiles: list[str]) -> Iterator[Arena]:
    """A server of the scripted model, run by whoever runs this; `user` is only its name."""
    with (
        tempfile.TemporaryDirectory(prefix="hostile-") as directory,
        new_terminal() as terminal,
        terminal.server(*SCRIPTED) as server,
        server.client() as client,
    ):
        programs = build(Path(directory), terminal.run_dir, profiles)
        made = Arena(server, client, programs, user)
        made.settle(profiles)
        yield made
