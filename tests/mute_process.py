"""`python -m tests.mute_process sleeps|spins|compiles --fd N`: reads one octet of its link, and
hangs, or waits for a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time


def main() -> None:
    how, fd = sys.argv[3], int(sys.argv[2])
    os.read(fd, 1)
    if how == "compiles":
        subprocess.Popen(["cat"], stdin=subprocess.PIPE).wait()  # ends with this process
    while True:
        if how == "sleeps":
            time.sleep(3600)


if __name__ == "__main__":
    main()
