"""What an inferlet writes to its stdout and stderr: passed on up to a cap, then thrown away."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Final

_READ_BYTES: Final = 65536  # all that a pipe holds
_THROTTLE_SECONDS: Final = 0.01  # between reads of output that is thrown away


class Output:
    """The read end of one pipe; passes on the first `cap` octets and a notice if there are more."""

    def __init__(self, fd: int, name: str, cap: int, forward: Callable[[bytes], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd = fd
        self._name = name
        self._cap = cap
        self.taken = 0  # octets passed on
        self._forward = forward
        self._cut_off = False
        self._timer: asyncio.TimerHandle | None = None
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._readable)

    def _readable(self) -> None:
        if not self._read():
            self.close()
        elif self._cut_off:  # a flood slows its writer down, not the host
            self._loop.remove_reader(self._fd)
            self._timer = self._loop.call_later(_THROTTLE_SECONDS, self._resume)

    def _resume(self) -> None:
        self._loop.add_reader(self._fd, self._readable)

    def _read(self) -> bool:
        """False at end-of-file."""
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return True
        kept = data[: max(0, self._cap - self.taken)]
        self.taken += len(kept)
        if kept:
            self._forward(kept)
        if len(kept) < len(data) and not self._cut_off:
            self._cut_off = True
            notice = f"\n[piehost: {self._name} is cut off after {self._cap} octets]\n"
            self._forward(notice.encode())
        return bool(data)

    def set_cap(self, cap: int) -> None:
        """From now on, all in all. What was thrown away does not come back."""
        self._cut_off = self._cut_off and cap <= self._cap
        self._cap = cap

    def finish(self) -> None:
        """The writer is dead: passes on what is left in the pipe, and closes it."""
        if self._fd >= 0:
            self._read()
            self.close()

    def close(self) -> None:
        if self._fd >= 0:
            if self._timer is not None:
                self._timer.cancel()
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
