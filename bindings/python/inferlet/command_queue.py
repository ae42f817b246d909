"""A queue of commands: their order, its end, and the handles made through it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .abi import Cancel, Command, CreateQueue, DestroyQueue, SetQueuePriority, Synchronize
from .checks import integer
from .errors import HandleError
from .future import Answer, Future, nothing

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from .model import Model


class CommandQueue:
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
        self._connection.append(CreateQueue(None, self._number, model.index))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.destroy()

    def __del__(self) -> None:
        if hasattr(self, "_doubtful"):  # false if the constructor raised
            self.destroy()

    def destroy(self) -> None:
        """destroy_queue, behind what is queued so far; nothing if it was destroyed already."""
        if not self.destroyed:
            self.destroyed = True
            self._connection.release(DestroyQueue(None, self._number))

    @property
    def number(self) -> int:
        """The queue on the wire. HandleError once it is destroyed."""
        if self.destroyed:
            raise HandleError("the queue was destroyed", "use it inside its `with` block")
        return self._number

    def release(self, number: int, dealloc: Command) -> None:
        """Queues `dealloc` of the handle `number`; called by finalizers."""
        self._connection.release(dealloc)
        if any(number in numbers for numbers in self._doubtful):
            # it may not exist, and that error must not stop the queue
            self._connection.release(
                Synchronize(None, self._number), Answer(self._connection, nothing)
            )

    def doubt(self, handles: range) -> None:
        """Some of `handles` may never have been made, because a command failed or was dropped."""
        if self._doubtful and self._doubtful[-1].stop == handles.start:
            self._doubtful[-1] = range(self._doubtful[-1].start, handles.stop)
        else:
            self._doubtful.append(handles)

    def vouch(self) -> None:
        """What is not freed by now was made after all: its `release` needs no `synchronize`, which
        would take an error that is not its own away from what comes behind."""
        self._doubtful.clear()

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
        self.doubt(self._unconfirmed())


class _Synchronized(Answer[None]):
    """`synchronize`: if it reports an error, the handles made before are in doubt."""

    __slots__ = ("_made", "_queue")

    def __init__(self, queue: CommandQueue, made: range) -> None:
        super().__init__(queue.runtime.connection, nothing)
        self._queue = queue
        self._made = made

    def fail(self, error: Exception) -> None:
        self._queue.doubt(self._made)
        super().fail(error)
