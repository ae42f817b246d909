"""Runs a user's script as `__main__` in a fork of the zygote, and ends the process."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
import traceback
from pathlib import Path
from types import ModuleType
from typing import Final, NoReturn

import msgspec

_STARTUP_FD: Final = 6
_LOST_OUTPUT: Final = 120  # as the interpreter's own exit code when its last flush fails


class _Startup(msgspec.Struct):
    """Of the start-up block (docs/abi.md, section 3), what is needed here."""

    args: list[str]


def run(path: str, env: dict[str, str]) -> NoReturn:
    """`sys.exit` is respected; an uncaught exception is printed on the script's stderr, and the
    exit code is 1. Ends without tearing the interpreter down: the kernel is faster."""
    _prepare(path, env)
    code = _execute(path)
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for non-daemon threads
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
        code = code or 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # nobody reads, or the script closed it
        code = code or _LOST_OUTPUT
    os._exit(code)


def _prepare(path: str, env: dict[str, str]) -> None:
    os.environ.update(env)  # the zygote's is empty
    block = os.pread(_STARTUP_FD, os.fstat(_STARTUP_FD).st_size, 0)
    sys.argv = [path, *msgspec.msgpack.decode(block, type=_Startup).args]
    sys.path.insert(0, str(Path(path).parent))
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = open(  # noqa: SIM115
            fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if numpy := sys.modules.get("numpy"):  # `random` reseeds itself after a fork
        key = numpy.frombuffer(os.urandom(624 * 4), numpy.uint32)
        numpy.random.set_state(("MT19937", key, 624))  # measured: 0.3 ms less than seed()
    gc.enable()


def _execute(path: str) -> int:
    main = ModuleType("__main__")
    main.__file__ = path
    main.__builtins__ = sys.modules["builtins"]  # type: ignore[attr-defined]
    sys.modules["__main__"] = main
    try:
        source = Path(path).read_bytes()
        code = compile(source, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OSError) as error:
        traceback.print_exception(type(error), error, None)
        return 1
    del source
    try:
        exec(code, main.__dict__)
    except SystemExit as exit_:
        return _exit_code(exit_)
    except BaseException as error:
        frames = error.__traceback__.tb_next if error.__traceback__ else None  # without this one
        sys.excepthook(type(error), error.with_traceback(frames), frames)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _exit_code(exit_: SystemExit) -> int:
    if exit_.code is None:
        return 0
    if isinstance(exit_.code, int):
        return exit_.code & 0xFF
    print(exit_.code, file=sys.stderr)  # noqa: T201
    return 1
