"""Runs one of piehost's own processes so that it cannot outlive the host.

    python -m piehost.host.child NAME PARENT_PID MODULE ARGUMENTS...

Every such process ends at the end-of-file of its link; the death signal is for one that is busy.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def main() -> None:
    name, parent, module = sys.argv[1:4]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NAME, f"pie-{name}".encode()[:15])
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the line above
        sys.exit(1)
    sys.argv = [module, *sys.argv[4:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
