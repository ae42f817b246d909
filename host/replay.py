"""Runs a program against a recording: what it asks is compared, what it is told was recorded.

Commands are compared one by one, however they are divided over frames. An answer is given as soon
as every command that was recorded before it has come; or, if the program sleeps and has read all it
was told, so that it may be waiting for it, as soon as the command that it answers has come. A
program that computes is waited for, however long.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, Protocol

from inferlet import abi
from inferlet.abi import Startup
from msgspec import Struct

from piehost.wire.client import Failed, Reason
from piehost.wire.recording import ToInferlet

from .allotment import Quota
from .errors import FailedAnswer
from .programs import Program
from .recording import Recording
from .replay_answers import Answers
from .replay_compare import Side, differences
from .replay_connection import Connection
from .replay_script import Asked, Bad, in_words, read_script
from .ring_places import RingPlaces
from .rings import RingSizes
from .stage import Stage

# octets that the program has not read; more answers wait. Well above what a tap lets wait, or the
# replay of a program that reads nothing would not come to the recorded end
_MOST_WAITING: Final = 1 << 20
_FRAMES_AHEAD: Final = 64  # looked through for an early answer; each has up to a ring of data
_LOOK_SECONDS: Final = 0.05  # between looks at whether it sleeps
_LOOKS: Final = 10  # in a row
# codes of reasons that a program's own end has; with all others it was ended
_OWN_ENDS: Final = ("", "signal", "sandbox", "cpu_seconds")
_DIFFERS: Final = 1  # exit code
_KILLED: Final = 137  # 128 + SIGKILL, which no program ends itself with


class Difference(Struct, kw_only=True):
    """The first thing that was not as recorded."""

    what: str
    command: int | None = None  # its number, from 1
    recorded: str | None = None
    came: str | None = None
    fields: list[str] = []  # of a command that is of the same kind


class Outcome(Struct, kw_only=True):
    code: int  # the exit code
    commands: int  # that were as recorded
    identical: bool  # all of them were, and so was the end
    difference: Difference | None = None
    reason: Reason | None = None  # why the program is dead, if it did not end by itself


class ReplayListener(Protocol):
    def message(self, data: bytes) -> None:
        """The program sent this, as recorded."""

    def output(self, stream: int, data: bytes) -> None:
        """It wrote this to its stdout (1) or stderr (2)."""


class _Found(Exception):
    """The first difference."""

    def __init__(self, difference: Difference) -> None:
        super().__init__(difference.what)
        self.difference = difference


class Replay:
    """One run. Made inside a running event loop; `outcome` is done at its end."""

    def __init__(
        self,
        recording: Recording,
        program: Program,
        startup: Startup,
        quota: Quota,
        waived: list[str],
        listener: ReplayListener,
    ) -> None:
        """`startup` is what the program is told: the recording's, or with other arguments."""
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self._recording = recording
        self._listener = listener
        self._places = RingPlaces(recording.head.startup)
        self._recorded_side, self._came_side = Side(self._places), Side(self._places)
        self._script = read_script(recording, self._places)
        self._ahead: deque[Asked | Bad | ToInferlet] = deque()  # read of it, still to happen
        self._matched = 0
        self._looks_again: asyncio.TimerHandle | None = None
        self._looks_asleep = 0  # how often in a row it was found asleep
        self._exit: tuple[int, Reason | None] | None = None
        head = recording.head
        self._stage = Stage(
            program,
            startup,
            head.vocabulary,
            RingSizes(head.ring_bytes, head.ring_in_bytes),
            quota,
            waived,
            self,
        )
        self._answers = Answers(self._places, self._stage.ring_out)
        self._connection = Connection(
            self._stage.sock, self._stage.ring_in, self._places, self._heard, self._go_on
        )
        self._loop.call_soon(self._go_on)

    def interrupt(self, code: int) -> None:
        """Ends it with that exit code; nothing is said of how it would have gone on."""
        if not self.outcome.done():
            what = f"interrupted after {self._matched} of {self._recording.commands} commands"
            self._over(code, reason=Reason(code="interrupted", what=what))

    def close(self) -> None:
        """Ends the program, if it runs, and all that was started for it."""
        self._stop_watching()
        self._stage.close()

    # --- what comes, and what was to come ------------------------------------------------------

    def _heard(self) -> None:
        self._looks_asleep = 0
        self._go_on()

    def _go_on(self) -> None:
        """Does what can be done now."""
        if self.outcome.done():
            return
        try:
            self._step()
        except _Found as found:
            self._stage.kill()
            self._over(_DIFFERS, difference=found.difference)
        except Exception as error:
            self._fail(error)
        else:
            self._watch()

    def _step(self) -> None:
        connection = self._connection
        while self._ahead or self._read_ahead():
            following = self._ahead[0]
            if isinstance(following, ToInferlet):
                if connection.waiting > _MOST_WAITING:
                    return
                self._tell(following)
            elif connection.came:
                self._compare(following, connection.came.popleft())
            else:
                if connection.at_end:
                    self._ended_early(following)
                return
            self._ahead.popleft()
        self._check_end()

    def _read_ahead(self) -> bool:
        """One more of what was recorded. False at the end."""
        following = next(self._script, None)
        if following is not None:
            self._ahead.append(following)
        return following is not None

    def _compare(self, recorded: Asked | Bad, came: Asked | Bad) -> None:
        number = self._matched + 1
        if isinstance(recorded, Bad) or isinstance(came, Bad):
            self._compare_bad(recorded, came)
            return
        found = differences(
            recorded.command,
            came.command,
            self._recorded_side.meaning(recorded.command, recorded.ring_in),
            self._came_side.meaning(came.command, came.ring_in),
        )
        if found is not None:
            raise _Found(
                Difference(
                    what=f"command {number} of {self._recording.commands} is another",
                    command=number,
                    recorded=found.recorded,
                    came=found.came,
                    fields=found.fields,
                )
            )
        self._recorded_side.done(number, recorded.command)
        self._came_side.done(number, came.command)
        self._answers.expect(recorded.command, came.command)
        self._matched = number
        if isinstance(came.command, abi.Send):
            self._listener.message(came.command.data)

    def _compare_bad(self, recorded: Asked | Bad, came: Asked | Bad) -> None:
        if isinstance(recorded, Bad) and isinstance(came, Bad):
            octets = min(len(recorded.data), len(came.data))  # how many came at once is chance
            if recorded.data[:octets] == came.data[:octets]:
                self._connection.hang_up()
                return
        raise _Found(
            Difference(
                what=f"after {self._matched} commands, what the ABI does not allow"
                + (" came otherwise" if isinstance(recorded, Bad) else " came"),
                command=self._matched + 1,
                recorded=in_words(recorded),
                came=in_words(came),
            )
        )

    # --- answers -------------------------------------------------------------------------------

    def _tell(self, told: ToInferlet) -> None:
        self._connection.tell(self._answers.frames(told))

    def _look(self) -> None:
        """Whether it may be waiting for an answer that was recorded after other commands."""
        self._looks_again = None
        if self._stage.sleeps():
            self._looks_asleep += 1
        else:
            self._looks_asleep = 0
        if self._looks_asleep >= _LOOKS:
            self._looks_asleep = 0
            try:
                self._tell_early()
            except Exception as error:
                self._fail(error)
        self._go_on()

    def _tell_early(self) -> None:
        """The next answers to what it has asked already."""
        at = frames = 0
        while frames < _FRAMES_AHEAD and (at < len(self._ahead) or self._read_ahead()):
            event = self._ahead[at]
            if isinstance(event, ToInferlet):
                if (divided := self._answers.early(event)) is not None:
                    early, self._ahead[at] = divided
                    self._tell(early)
                    return
                frames += 1
            at += 1

    def _watch(self) -> None:
        self._connection.watch()
        if self._looks_again is None and not self._connection.at_end:
            self._looks_again = self._loop.call_later(_LOOK_SECONDS, self._look)

    def _stop_watching(self) -> None:
        if self._looks_again is not None:
            self._looks_again.cancel()
        self._connection.stop_watching()

    # --- the end -------------------------------------------------------------------------------

    def _check_end(self) -> None:
        """All that was recorded has happened."""
        end = self._recording.end
        if end.reason not in _OWN_ENDS or end.code == _KILLED:
            self._stage.kill()
            what = f"the recorded run was ended here: {end.reason}"
            self._over(end.code, True, reason=Reason(code=end.reason, what=what))
        elif self._connection.came:
            number = self._matched + 1
            raise _Found(
                Difference(
                    what=f"the recording ends with command {self._matched}, the program goes on",
                    command=number,
                    came=in_words(self._connection.came[0]),
                )
            )
        elif self._exit is not None:
            code, reason = self._exit
            if code != end.code:
                raise _Found(
                    Difference(
                        what="the exit code is another",
                        recorded=str(end.code),
                        came=f"{code} ({reason.what})" if reason is not None else str(code),
                    )
                )
            self._over(code, True, reason=reason)

    def _ended_early(self, recorded: Asked | Bad) -> None:
        """It can say nothing more, and more was recorded. How it ends belongs to the report."""
        if self._exit is not None:
            code, reason = self._exit
            raise _Found(
                Difference(
                    what=f"the program ended after {self._matched} of "
                    f"{self._recording.commands} commands",
                    command=self._matched + 1,
                    recorded=in_words(recorded),
                    came=f"exit code {code}" + (f" ({reason.what})" if reason is not None else ""),
                )
            )

    def _over(
        self,
        code: int,
        identical: bool = False,
        difference: Difference | None = None,
        reason: Reason | None = None,
    ) -> None:
        self._stop_watching()
        self.outcome.set_result(
            Outcome(
                code=code,
                commands=self._matched,
                identical=identical,
                difference=difference,
                reason=reason,
            )
        )

    def _fail(self, error: Exception) -> None:
        if not self.outcome.done():
            self._stop_watching()
            self.outcome.set_exception(error)

    # --- stage ---------------------------------------------------------------------------------

    def stage_output(self, stream: int, data: bytes) -> None:
        try:
            self._listener.output(stream, data)
        except OSError as error:  # nobody reads it
            self._fail(error)

    def stage_exited(self, code: int, reason: Reason | None) -> None:
        self._exit = code, reason
        self._connection.read_out()
        self._go_on()

    def stage_failed(self, failed: Failed) -> None:
        self._fail(FailedAnswer(failed.code, failed.reason))
