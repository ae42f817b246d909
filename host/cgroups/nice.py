"""What is left where there are no control groups: an inferlet gives way to the server.

Nice values count between the processes of one session only if the kernel groups sessions
(`kernel.sched_autogroup_enabled`); then the session has a nice value too, and an inferlet has a
session of its own.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

_MORE: Final = 10  # than the host's nice value: weighs about a ninth of it, sched(7)
_MOST: Final = 19


def give_way(pid: int) -> None:
    """Its threads start with the nice value of the thread that starts them. What cannot be set is
    left, such as the session's for a user who has set another's within a tenth of a second."""
    nice = min(_MOST, os.getpriority(os.PRIO_PROCESS, 0) + _MORE)
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.setpriority(os.PRIO_PROCESS, int(thread.name), nice)
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))
