"""Attacks by tests/attackers/exhaust.c: on all there is of something, and on what it was given."""

from __future__ import annotations

from piehost.host.sandbox.launcher import UNNAMED

from .cases import Case, output_of, stopped

_NO_GROUP = "refused: cgroup"
_THREADS = stopped("EAGAIN", 60, 64)  # Node has some of its own

_INHERITS = "0 1 2 3 4 5 6 7 PIEHOST_ABI=1 LANG=C.UTF-8 PATH=/usr/bin:/bin HOME=/"
_OWN = dict.fromkeys(("node", "perl"), "its interpreter opens and sets more of its own")
_COMPILED = dict.fromkeys(("python", "node", "perl"), "the same instruction as `dynamic` makes")


def _opens(name: str, path: str) -> Case:
    return Case(name, "P1", "says: refused", "exhaust", ("open", path), hidden="says: no such file",
                quick=True)  # fmt: skip


def _takes(name: str, expected: str, *words: object, **fields: object) -> Case:
    return Case(name, "P5", expected, "exhaust", words, quick=True, **fields)  # type: ignore[arg-type]


CASES = [
    # that the way is right: who may open files at all opens its own
    _opens("its own file", "{place}/own")._replace(
        on_profile=dict.fromkeys(("python", "node", "perl"), "says: opened")),
    _opens("a symlink out of its folder", "{place}/symlink"),
    _opens("a folder's symlink out of its folder", "{place}/folder/secret"),
    _opens("dots out of its folder", "{place}/../secret"),
    _opens("a hard link outside of its folder", "{place}/../hardlink"),
    _opens("its own memory as a file", "/proc/self/mem"),
    _opens("the run directory", "{run}"),
    Case("what it inherits", "P1", f"says: {_INHERITS}"[:86], "exhaust", ("inherited",),
         not_on=_OWN, quick=True),
    *(Case(f"a call of {name}", "P3", f"ended: sandbox ({UNNAMED})",
           "foreign", (name,), not_on=_COMPILED, quick=True) for name in ("i386", "x32")),
    _takes("10,000 threads", "EAGAIN, 60 to 64", "threads", judge=_THREADS),
    _takes("10,000 threads, two of a kind", "EAGAIN, 60 to 64", "threads", crowd=2,
           judge=_THREADS),
    _takes(
        "memory for ever", "ended: memory", "memory", quotas={"memory": "96MiB"}, cgroup=_NO_GROUP
    ),
    _takes(
        "memory for ever, two of a kind",
        "ended: memory",
        "memory",
        quotas={"memory": "96MiB"},
        crowd=2,
        cgroup=_NO_GROUP,
    ),
    _takes("all address space", "ENOMEM, 800 to 1024", "address-space", cgroup=_NO_GROUP,
           quotas={"memory": "4GiB", "address_space": "1GiB"}, judge=stopped("ENOMEM", 800, 1024)),
    _takes("all descriptors", "says: EMFILE at 64", "descriptors"),
    _takes("mappings of ring in", "ENOMEM, 800 to 1024", "mappings",
           quotas={"address_space": "1GiB"}, judge=stopped("ENOMEM", 800, 1024)),
    _takes(
        "64 MiB of output",
        "cut at 65536, exit code 0",
        "flood",
        quotas={"output_bytes": "65536"},
        judge=output_of(65536),
    ),
    _takes("ignores every signal", "ended: stopped, ignores them all", "ignore", stays="stopped"),
    _takes("processor time, with a handler", "ended: cpu_seconds", "spin",
           quotas={"cpu_seconds": "1"}),
    _takes("processor time on threads", "ended: cpu_seconds", "spin-threads",
           quotas={"cpu_seconds": "1"}),
    _takes("wall time", "ended: wall_seconds, ignores them all", "ignore",
           quotas={"wall_seconds": "5"}),  # till then it has said so, however slow the machine
    _takes("spins for ever", "held", "spin", stays="held"),
    _takes("spins for ever on threads, four of a kind", "held", "spin-threads", crowd=4,
           stays="held"),
    _takes("spins for ever, over its share", "within its share", "spin-threads",
           quotas={"cpu": "20%"}, stays="share", cgroup=_NO_GROUP),
    _takes("leaves a core", "ended: signal, 0 0", "core"),
    _takes("its stack", "ended: signal", "stack"),
    # the limit of its files, and what else there is: a seal, or that it may read only
    *(_takes(f"writes beyond the end of descriptor {fd}", "says: File too large", "grow", fd,
             quotas={"file_size": "0"}) for fd in (4, 5, 6)),
    *(_takes(f"writes beyond the end of descriptor {fd}, files may grow", f"says: {refused}",
             "grow", fd, quotas={"file_size": "64MiB"})
      for fd, refused in (*((sealed, "Operation not permitted") for sealed in (4, 5, 6)),
                          (7, "Bad file descriptor"))),
]  # fmt: skip
