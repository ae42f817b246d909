"""Runs a program in every weather: first the plain one, which tells what there is to disturb."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from inferlet import abi
from inferlet.errors import BY_CODE, FrameError
from msgspec import Struct

from ..client import Client
from ..client import Run as Launched
from .faults import can_fail, op_of
from .runs import STUCK, Run, Sent, Told, read
from .verdicts import FAIR

_AT_ONCE: Final = 8  # runs, each with a process of its own
_CODES: Final = [code for code in BY_CODE if code != FrameError.code]  # no answer has that one
_UNKNOWN_CODE: Final = 4242
_CUTS: Final = 3
# as little as there may be; what the process itself has is not of the ABI
_SMALLEST: Final = {
    "kv_pages": "1",
    "embeds": "1",
    "tokens": "1",
    "commands": "1",
    "top_k": "1",
    "ring_bytes": "4096",
    "ring_in_bytes": "4096",
    "history": "0",
    "export_pages": "0",
    "children": "0",
    "subscriptions": "0",
    "http_streams": "0",
    "store_bytes": "0",
}


class Subject(Struct, kw_only=True):
    """What is examined, and how it is launched."""

    program: Path
    args: Sequence[str] = ()
    inputs: Sequence[bytes] = ()  # messages for its `receive`, which is then closed
    quotas: Mapping[str, str] = {}
    waived: Sequence[str] = ()
    egress: Sequence[str] = ()
    patience: int = 30  # seconds after which a run is stuck


class _Trial(Struct):
    weather: str
    path: Path
    launched: Launched


class Trials:
    """Of one program, on the host of `client`; recordings go to the empty folder `folder`."""

    def __init__(
        self,
        client: Client,
        subject: Subject,
        folder: Path,
        went: Callable[[int, int], object] = lambda done, known: None,
    ) -> None:
        """`went` hears after each run how many are done, and of how many it knows by then."""
        self._client = client
        self._subject = subject
        self._folder = folder
        self._went = went
        self._count = 0  # of those started
        self._done = 0

    def run(self) -> list[Run]:
        """All runs; those in other weathers only if the plain one goes well. HostError if it
        cannot be launched."""
        runs = self._run(["plain", "again"])
        plain = runs[0]
        if plain.is_whole and plain.code == 0:
            runs += self._run([*FAIR[2:], "limits"])
            late = next(run for run in runs if run.weather == "late")
            runs += self._run([*_errors(plain), *_cuts(late)])
        return runs

    def _run(self, weathers: list[str]) -> list[Run]:
        """In the order of `weathers`, a few at a time."""
        waiting = deque(weathers)
        going: list[_Trial] = []
        done: dict[str, Run] = {}
        while waiting or going:
            while waiting and len(going) < _AT_ONCE:
                going.append(self._start(waiting.popleft()))
            self._client.pump()
            for trial in [trial for trial in going if trial.launched.over]:
                going.remove(trial)
                run = read(trial.weather, str(trial.path), trial.launched.result().reason)
                trial.path.unlink()
                done[trial.weather] = run
                self._done += 1
                self._went(self._done, self._count + len(waiting))
        return [done[weather] for weather in weathers]

    def _start(self, weather: str) -> _Trial:
        subject = self._subject
        self._count += 1
        path = self._folder / f"{self._count}.pie"
        smallest = _SMALLEST if weather == "limits" else {}
        launched = self._client.launch(
            subject.program,
            subject.args,
            {STUCK: str(subject.patience), **subject.quotas, **smallest},
            subject.waived,
            user=f"conform-{self._folder.name}-{self._count}",  # so that no run sees another's
            egress=subject.egress,
            record=path,
            weather=weather,
        )
        for message in subject.inputs:
            launched.send(message)
        launched.close_input()
        return _Trial(weather, path, launched)


def _errors(plain: Run) -> Iterator[str]:
    """Each command that it uses fails once, in the middle of its uses; so does something with each
    code there is, and with one there is not."""
    uses = Counter(op_of(sent.command) for sent in plain.sent() if can_fail(sent.command))
    ops = sorted(uses)
    if not ops:
        return
    for i in range(max(len(ops), len(_CODES))):
        op, turn = ops[i % len(ops)], i // len(ops)
        yield f"error:{op}:{_spread(uses[op], turn)}:{_CODES[i % len(_CODES)]}"
    for op in {ops[0], ops[-1]}:
        yield f"error:{op}:{_spread(uses[op], 0)}:{_UNKNOWN_CODE}"


def _spread(count: int, turn: int) -> int:
    """One of 1 to `count`: the middle one first, then from the first one on."""
    return (count + 1) // 2 if turn == 0 else (turn - 1) % count + 1


def _cuts(late: Run) -> list[str]:
    """Frames behind which it waited for an answer and then went on, so that it has to notice."""
    frames: list[int] = []
    last, answered = 0, False  # the latest frame; something of it was answered
    for step in late.steps:
        if isinstance(step, Told):
            asked = step.sent
            if asked is not None and not isinstance(asked.command, abi.Send):
                answered |= asked.frame == last
        elif isinstance(step, Sent) and step.frame != last:
            if answered:
                frames.append(last)
            last, answered = step.frame, False
    chosen = {frames[i * (len(frames) - 1) // (_CUTS - 1)] for i in range(_CUTS) if frames}
    return [f"cut:{frame}" for frame in sorted(chosen)]
