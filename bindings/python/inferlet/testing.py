"""A pytest plugin to test inferlets: real sandbox, real controller, and a model that says what the
test tells it.

    from inferlet.testing import Piehost

    def test_it_answers(piehost: Piehost) -> None:
        piehost.says("The capital of France is", " Paris.")
        run = piehost.launch("main.py", "--prompt", "The capital of France is")
        assert run.text == " Paris."

pytest finds the fixture by itself where this package is installed. Its hosts are piehost's, so
piehost has to be installed too; nothing of it is imported before a test asks for the fixture.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from piehost.host.client import Client
    from piehost.host.client import Run as HostRun
    from piehost.host.ephemeral import EphemeralHost
    from piehost.wire.client import Reason
    from piehost.wire.stats import SeatStats

_MOST_HOSTS: Final = 4  # each is a handful of processes; the one used longest ago makes room


@dataclass(frozen=True)
class Run:
    """An inferlet that has ended.

    `exit_code` is as that of `piehost launch`: its own, 128 + n for signal n, 126 or 127 for a
    program that cannot run or is not there. `reason` says why it was ended or could not start:
    None, or `code`, `what`, `why` and `hint`. `stats` counts what it used (`tokens_out`, ...).
    `str(run)` is all of it for people; pytest shows that of each launch of a test that failed.
    """

    messages: list[bytes]
    stdout: str
    stderr: str
    exit_code: int
    reason: Reason | None = None
    stats: SeatStats | None = field(default=None, repr=False)

    @property
    def text(self) -> str:
        """The messages, joined. Octets that are no UTF-8 become U+FFFD."""
        return b"".join(self.messages).decode(errors="replace")

    def __str__(self) -> str:
        lines = [f"exit code {self.exit_code}"]
        if self.reason is not None:
            parts = (self.reason.what, self.reason.why, self.reason.hint)
            lines.append(f"ended because {'; '.join(filter(None, parts))}")
        lines += [f"message {message!r}" for message in self.messages]
        for name, text in (("stdout", self.stdout), ("stderr", self.stderr)):
            lines += [f"{name} {line}" for line in text.splitlines()]
        return "\n".join(lines)


class Piehost:
    """Launches inferlets in one test; the fixture `piehost`. They are one user's: what they store,
    export or broadcast no other test sees.

    The model says what `says` and `otherwise` tell it; without either, what the built-in script of
    `--model scripted` does. `use_model` takes another.
    """

    def __init__(self, test: pytest.Item, hosts: _Hosts) -> None:
        self._test = test
        self._folder = test.path.parent
        self._hosts = hosts
        self._user = hosts.new_user()
        self._says: list[tuple[str, str]] = []
        self._otherwise: str | None = None
        self._model: str | None = None

    def says(self, after: str, text: str) -> None:
        """After a context that ends in `after`, the model says `text` and ends.

        `text` may hold the model's control tokens, such as `<|im_end|>`. Of several that match,
        the longest `after` counts, of equals the one given last.
        """
        self._says.append((after, text))

    def otherwise(self, text: str) -> None:
        """What the model says where nothing given to `says` matches. Without it, it then goes on
        without sense or end, though always in the same way."""
        self._otherwise = text

    def use_model(self, model: str) -> None:
        """From now on in this test: "default", the embedded trained model; a folder or a hub id;
        or "scripted:PATH.toml". Paths are relative to the test's folder."""
        self._model = model

    def launch(
        self,
        program: str | Path,
        *args: str,
        input: Sequence[str | bytes] = (),  # noqa: A002
        quota: Mapping[str, int | str] | None = None,
        egress: Sequence[str] = (),
        allow_degraded: Sequence[str] = (),
        timeout: float = 60.0,
    ) -> Run:
        """Runs `program` (relative to the test's folder) to its end, as `piehost launch` does.

        `input`: messages for its `receive`, which is closed behind the last. `quota`, `egress` and
        `allow_degraded` are the options of these names. TimeoutError, with what it has said, if it
        has not ended `timeout` seconds after its start; it is ended then. TypeError if an argument
        is no str. The test fails if the model cannot be loaded.
        """
        from piehost.host import programs
        from piehost.host.errors import HostError, exit_code_of
        from piehost.wire.client import EXIT_HOST

        for argument in args:
            if not isinstance(argument, str):
                raise TypeError(
                    f"an argument of {program} is {argument!r}, no str: give each one by itself, "
                    f"launch({str(program)!r}, '--name', 'value')"
                )
        quotas = {key: str(value) for key, value in (quota or {}).items()}
        failure = ""
        path = self._folder / program
        try:
            programs.check_syntax(programs.resolve(str(path)))
            client = self._hosts.get(self._chosen()).client
            run = client.launch(path, args, quotas, allow_degraded, user=self._user, egress=egress)
            for message in input:
                run.send(message if isinstance(message, bytes) else message.encode())
            run.close_input()
            in_time = _wait(client, run, timeout)
            ended = _collected(run)
        except HostError as error:
            if exit_code_of(error) == EXIT_HOST:
                self._hosts.forget(self._chosen())
                failure = str(error)
            in_time, ended = True, Run([], "", "", exit_code_of(error), error.reason)
        if failure:
            pytest.fail(failure, pytrace=False)
        command = shlex.join(["piehost", "launch", str(program), "--", *args])
        self._test.add_report_section("call", "launch", f"{command}\n{ended}\n")
        if not in_time:
            raise TimeoutError(f"{program} has not ended after {timeout:g} s\n{ended}")
        return ended

    def _chosen(self) -> str:
        """As `--model` takes it."""
        from piehost.host.options import named_model

        if self._model is not None:
            kind, colon, path = self._model.partition(":")
            if kind == "scripted" and colon:
                return f"scripted:{self._folder / path}"
            folder = self._folder / self._model
            return named_model(str(folder) if folder.is_dir() else self._model)
        if not self._says and self._otherwise is None:
            return "scripted"
        tables = [
            f"[[say]]\nafter = {_toml(after)}\ntext = {_toml(text)}\n" for after, text in self._says
        ]
        if self._otherwise is not None:
            tables.append(f"[otherwise]\ntext = {_toml(self._otherwise)}\n")
        return f"scripted:{self._hosts.script(''.join(tables))}"


class _Hosts:
    """The hosts of one test session, by model: tests with the same script share one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._scripts: dict[str, Path] = {}
        self._running: dict[str, EphemeralHost] = {}  # the one used last comes last
        self._users = 0

    def new_user(self) -> str:
        self._users += 1
        return f"test-{self._users}"

    def script(self, text: str) -> Path:
        """A file that holds `text`, the same one for the same text."""
        if text not in self._scripts:
            path = self._folder / f"script-{len(self._scripts)}.toml"
            path.write_text(text, encoding="utf-8")
            self._scripts[text] = path
        return self._scripts[text]

    def get(self, model: str) -> EphemeralHost:
        """The host that serves `model`, started if it is not there."""
        from piehost.host.ephemeral import EphemeralHost
        from piehost.host.options import Options

        host = self._running.pop(model, None)
        if host is None:
            while len(self._running) >= _MOST_HOSTS:
                self.forget(next(iter(self._running)))
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PIEHOST_STORE", str(self._folder / "store.sqlite3"))
                host = EphemeralHost(Options(model=model))
        self._running[model] = host
        return host

    def forget(self, model: str) -> None:
        """Ends the host of `model`, if there is one."""
        if host := self._running.pop(model, None):
            host.close()

    def close(self) -> None:
        for model in list(self._running):
            self.forget(model)


def _wait(client: Client, run: HostRun, timeout: float) -> bool:
    """Whether it ended in time, once it had started; it is being ended if not. Its events stay
    with it."""
    while not run.id and not run.over:
        client.pump()
    deadline = time.monotonic() + timeout
    while not run.over and (left := deadline - time.monotonic()) > 0:
        client.pump(left)
    in_time = run.over
    if not in_time:
        run.cancel()
    return in_time


def _collected(run: HostRun) -> Run:
    """Waits for the end and gathers all events. FailedAnswer if it could not be launched."""
    result = run.result()
    return Run(
        messages=result.messages,
        stdout=result.stdout.decode(errors="replace"),
        stderr=result.stderr.decode(errors="replace"),
        exit_code=result.code,
        reason=result.reason,
        stats=result.stats,
    )


def _toml(text: str) -> str:
    """A basic string of TOML: as JSON's, but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


@pytest.fixture(scope="session")
def _piehost_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Hosts]:
    try:
        import piehost.host.ephemeral  # noqa: F401
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("piehost"):
            raise
        pytest.fail(
            "the fixture `piehost` runs inferlets on piehost, which is not installed here: "
            "install piehost beside inferlet",
            pytrace=False,
        )
    hosts = _Hosts(tmp_path_factory.mktemp("piehost"))
    yield hosts
    hosts.close()


@pytest.fixture
def piehost(request: pytest.FixtureRequest, _piehost_hosts: _Hosts) -> Piehost:
    """Launches inferlets on a scripted model, or another (`Piehost.use_model`)."""
    return Piehost(request.node, _piehost_hosts)
