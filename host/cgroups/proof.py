"""Proof by attempt that groups hold: a process of ours joins one and tries to pass its limits.

Nobody is killed, so nothing is written to the kernel's log: the memory it touches is memory that
may be taken from it (MADV_FREE), and is, when its group has no room for more.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Final

from .limits import GroupLimits
from .tree import Tree

_MIB: Final = 1 << 20
_LIMITS: Final = GroupLimits(memory=4 * _MIB, threads=1, cpu=2)
_SECONDS: Final = 30.0
# arguments: the file cpu.stat, and the folders to join
_ATTEMPT: Final = """
import mmap, os, sys, time
for folder in sys.argv[2:]:
    with open(folder + "/cgroup.procs", "w") as procs:
        procs.write("0")
try:
    if not os.fork():
        os._exit(0)
    os.wait()
    print("a second process was born under a limit of one")
except OSError:
    pass
blocks = []
for _ in range(8):
    block = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, 1 << 20, 4096):
        block[page] = 1
    block.madvise(mmap.MADV_FREE)
    blocks.append(block)
end = time.monotonic() + 20
while time.monotonic() < end:
    with open(sys.argv[1]) as stat:
        if dict(line.split() for line in stat)["nr_throttled"] != "0":
            sys.exit()
print("20 s of a busy loop were not held back under a limit of 2% of a core")
"""


class Attempt:
    """Runs from the constructor on, some tenths of a second; `result` waits for it."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._name = "proof"
        tree.make(self._name)
        tree.limit(self._name, _LIMITS)
        stat = tree.folder(self._name, "cpu") / "cpu.stat"
        folders = [str(folder) for folder in tree.folders(self._name)]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _ATTEMPT, str(stat), *folders],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self) -> str | None:
        """What did not hold, in words; None if all did."""
        try:
            out, err = self._process.communicate(timeout=_SECONDS)
            return self._judge(out, err)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return "an attempt to pass its limits did not end"
        finally:
            self._tree.remove(self._name)

    def _judge(self, out: str, err: str) -> str | None:
        if self._process.returncode != 0 and not self._tree.usage(self._name).oom_kills:
            last = err.strip().splitlines()[-1:] or [f"exit status {self._process.returncode}"]
            return f"a process could not join: {last[0]}"
        if not self._tree.usage(self._name).reached:
            return "8 MiB were touched under a limit of 4 MiB"
        return out.strip() or None
