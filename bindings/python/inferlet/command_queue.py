"""A queue of commands: their order, its end, and the handles made through it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .abi import Cancel, Command, CreateQueue, DestroyQueue, SetQueuePriority, Synchronize
from .checks import integer
from .errors import CancelledError, HandleError, InferletError
from .future import Answer, Future, nothing
from .scope import Scoped

if TYPE_CHECKING:
    from .connection import Connection
    from .model import Model


class CommandQueue(Scoped):
    """Commands in order, each as if carried out before the next; `with` destroys it at the end.

    Destroying it cancels what has not run and frees every page, embed and token made through it.
    """

    def __init__(self, model: Model) -> None:
        """create_queue."""
        self.model = model
        self.runtime = model.runtime
        self.destroyed = False
        self._connection = self.runtime.connection
        self._number = self.runtime.new_handle()
        self._confirmed = self._number  # handles up to this one are covered by a synchronize
        self._doubtful: list[range] = []  # those among which an allocation may have failed
        self._owed: list[Exception] = []  # met by `release`, to be reported by `synchronize`
        self._connection.append(CreateQueue(None, self._number, model.index))

    def __del__(self) -> None:
        if hasattr(self, "_doubtful"):  # false if the constructor raised
            self.destroy()

    def destroy(self) -> None:
        """destroy_queue, behind what is queued so far; nothing if it was destroyed already."""
        if not self.destroyed:
            self.destroyed = True
            self._connection.release(DestroyQueue(None, self._number))

    def _leave(self) -> None:
        self.destroy()

    @property
    def number(self) -> int:
        """The queue on the wire. HandleError once it is destroyed."""
        if self.destroyed:
            raise HandleError("the queue was destroyed", "use it inside its `with` block")
        return self._number

    def release(self, number: int, dealloc: Command) -> None:
        """Queues `dealloc` of the handle `number`; called by finalizers."""
        connection = self._connection
        if not any(number in numbers for numbers in self._doubtful):
            connection.release(dealloc)
            return
        # it may not exist: that error must not stop the queue, nor hide one from before
        connection.release(Synchronize(None, self._number), _Earlier(connection, self._owed))
        connection.release(dealloc)
        connection.release(Synchronize(None, self._number), Answer(connection, nothing))

    def doubt(self, handles: range) -> None:
        """Some of `handles` may never have been made, because a command failed or was dropped."""
        if self._doubtful and self._doubtful[-1].stop == handles.start:
            self._doubtful[-1] = range(self._doubtful[-1].start, handles.stop)
        else:
            self._doubtful.append(handles)

    def vouch(self) -> None:
        """What is not freed by now was made after all: its `release` needs no `synchronize`, which
        would take an error that is not its own away from what comes behind. What those before this
        have met is of commands that nobody asks about."""
        self._doubtful.clear()
        self._owed = []  # another one than theirs

    def take_owed(self) -> Exception | None:
        """The error that a `release` met before what is answered now."""
        owed = self._owed[0] if self._owed else None
        self._owed.clear()
        return owed

    def _unconfirmed(self) -> range:
        """Handles made since this was last asked."""
        first, self._confirmed = self._confirmed + 1, self.runtime.last_handle
        return range(first, self._confirmed + 1)

    def synchronize(self) -> Future[None]:
        """Resolves when everything queued so far was carried out, or with the error that stopped
        the queue; then the queue goes on."""
        command = Synchronize(None, self.number)
        return self._connection.ask(command, _Synchronized(self, self._unconfirmed()))

    def set_queue_priority(self, priority: int) -> None:
        """-8 to 7, higher goes first, 0 at first; at once. ArgumentError if out of range."""
        level = integer("the priority", priority, 7, "-8 to 7", least=-8)
        self._connection.append(SetQueuePriority(None, self.number, level))

    def cancel(self) -> None:
        """Drops, at once, what the accelerator has not begun: those futures fail with
        CancelledError, and the queue goes on."""
        self._connection.append(Cancel(None, self.number))
        # It drops what made handles, but not the deallocs behind that, which must not stop the
        # queue. A HandleError from before is lost with theirs: nobody can tell them apart.
        behind = _Earlier(self._connection, self._owed, HandleError)
        self._connection.ask(Synchronize(None, self._number), behind)
        self.doubt(self._unconfirmed())


class _Earlier(Answer[None]):
    """A `synchronize` that the program did not ask for. What it reports is an error of the
    program's own commands, which the next one that it asks for owes it, unless it is `not_owed`."""

    __slots__ = ("_not_owed", "_owed")

    def __init__(
        self,
        connection: Connection,
        owed: list[Exception],
        *not_owed: type[InferletError],
    ) -> None:
        super().__init__(connection, nothing)
        self._owed = owed
        # cancelled: it was not carried out
        self._not_owed: tuple[type[InferletError], ...] = (CancelledError, *not_owed)

    def fail(self, error: Exception) -> None:
        if not isinstance(error, self._not_owed):
            self._owed.append(error)
        super().fail(error)


class _Synchronized(Answer[None]):
    """`synchronize`: if it reports an error, the handles made before are in doubt."""

    __slots__ = ("_made", "_queue")

    def __init__(self, queue: CommandQueue, made: range) -> None:
        super().__init__(queue.runtime.connection, nothing)
        self._queue = queue
        self._made = made

    def resolve(self, value: object) -> None:
        if (owed := self._queue.take_owed()) is not None:
            self.fail(owed)
        else:
            super().resolve(value)

    def fail(self, error: Exception) -> None:
        self._queue.doubt(self._made)
        carried_out = not isinstance(error, CancelledError)
        super().fail((self._queue.take_owed() if carried_out else None) or error)
