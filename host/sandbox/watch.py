"""Which forbidden call killed an inferlet: the kernel's SIGSYS does not tell its parent.

(waitid has the signal only, a zombie's /proc/PID/syscall is empty, audit needs privileges.) So the
launcher puts a filter above all it starts that hands forbidden calls to a listener, and the
inferlet's own filter answers TRACE for them, which ranks below. The caller is held inside its call,
which never happens; the launcher kills the process and knows the number. What the launcher itself
does in a child's set-up passes, by a secret number (`calls.PASSAGE`). A script could find it in the
memory it shares with the zygote, but all it gains is that its own filter refuses such a call.

Nothing but the name depends on the launcher. Should the listener be gone, TRACE without a tracer
refuses the call (ENOSYS); a caller that a signal gets out before the launcher looks is refused too.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from . import kernel
from .bpf import watch_filter
from .calls import PASSAGE
from .policy import load


class Watch:
    """One listener for all inferlets of this process. It takes no time of a launch."""

    def __init__(self) -> None:
        """Filters this process, for ever. OSError if the kernel cannot, or another listener is
        above this process already (EBUSY, in some containers)."""
        program = kernel.SeccompProgram(watch_filter(load("native"), PASSAGE).code)
        kernel.set_no_new_privs()
        self._listener = program.load_with_listener()

    def fileno(self) -> int:
        return self._listener

    def receive(self) -> tuple[int, int] | None:
        """(process id, system call) of a caller that is being held; None if it is gone."""
        notification = kernel.receive_notification(self._listener)
        if notification is None:
            return None
        thread, number = notification
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{thread}/status").read_text().splitlines():
                if line.startswith("Tgid:"):
                    return int(line.split()[1]), number
        return thread, number
