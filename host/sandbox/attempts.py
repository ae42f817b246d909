"""What `probe.py` runs as an inferlet: it tries to get out, and prints how each try ended.

    attempts.py SIBLING_PID    one JSON map, name of the attempt -> name of the errno, or "done"
    attempts.py ptrace         should not survive
    attempts.py wait           sleeps until it is killed
    attempts.py write          writes 1 MiB to its standard output
    attempts.py abort

Imports nothing of piehost: it is run by its path, as any script is.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

_PTRACE = 101
_RING_OUT = 4


def attempt(act: Callable[[], object]) -> str:
    try:
        act()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    except MemoryError:
        return "ENOMEM"
    return "done"


def open_all_descriptors() -> None:
    held = []
    try:
        for _ in range(resource.getrlimit(resource.RLIMIT_NOFILE)[0] + 8):
            held.append(os.dup(0))
    finally:
        for fd in held:
            os.close(fd)


def fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def start_threads() -> str:
    threading.stack_size(64 << 10)
    stop = threading.Event()
    started = []
    try:
        for _ in range(1_000):
            thread = threading.Thread(target=stop.wait)
            thread.start()
            started.append(thread)
    except RuntimeError:
        pass
    stop.set()
    for thread in started:
        thread.join()
    return f"{len(started) + 1} at once"


def attempts(sibling: int) -> dict[str, str]:
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    shared = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
    read_write = mmap.PROT_READ | mmap.PROT_WRITE
    tries: dict[str, Callable[[], object]] = {
        "open_root": lambda: os.open("/", os.O_RDONLY),
        "see_file": lambda: Path("/etc/passwd").stat(),
        "create_file": lambda: os.open("/tmp/piehost-probe", os.O_WRONLY | os.O_CREAT),
        "socket": lambda: socket.socket(socket.AF_INET),
        "connect": lambda: socket.socket(fileno=3).connect("\0piehost-probe"),
        "fork": fork,
        "exec": lambda: os.execv("/bin/true", ["true"]),
        "write_and_execute": lambda: mmap.mmap(-1, 4096, anonymous, read_write | mmap.PROT_EXEC),
        "shared_memory": lambda: mmap.mmap(-1, 4096, shared, read_write),
        "memfd": lambda: os.memfd_create("probe"),
        "address_space": lambda: mmap.mmap(-1, 8 << 30, anonymous, read_write),
        "descriptors": open_all_descriptors,
        "read_ring": lambda: mmap.mmap(_RING_OUT, 4096, mmap.MAP_SHARED, mmap.PROT_READ),
        "write_ring": lambda: mmap.mmap(_RING_OUT, 4096, mmap.MAP_SHARED, read_write),
        "sibling_memory": lambda: os.open(f"/proc/{sibling}/mem", os.O_RDONLY),
        "sibling_signal": lambda: os.kill(sibling, signal.SIGKILL),
    }
    return {name: attempt(act) for name, act in tries.items()} | {"threads": start_threads()}


def main() -> None:
    what = sys.argv[1]
    if what == "ptrace":
        ctypes.CDLL(None).syscall(_PTRACE, 0, 0, 0, 0)
    elif what == "wait":
        while True:
            time.sleep(60)
    elif what == "write":
        with contextlib.suppress(OSError):
            for _ in range(256):
                os.write(1, b"x" * 4096)
    elif what == "abort":
        os.abort()
    else:
        print(json.dumps(attempts(int(what))))  # noqa: T201


main()
