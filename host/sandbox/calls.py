"""Carries out a list of system calls in a child, without any Python in between.

A forked interpreter pays for every page it touches (measured: 2.1 ms a launch). So what a
child has to do is written down as a table before it exists, and a few instructions of machine code
work it off: in a child that shares this process's memory until it execs, as vfork's does (measured:
0.6 ms a launch), or in a forked one. It touches no stack and no memory but the table.
"""

from __future__ import annotations

import array
import ctypes
import mmap
import os
import signal
import struct
from collections.abc import Callable
from typing import Any, Final

from .policy import syscalls

STATUS_FD: Final = 8  # where a failed call is reported
# A random number of this process, in the sixth argument of every call of a table that has no use
# for it: the watching filter above the launcher (`watch.py`) lets such calls pass.
PASSAGE: Final = int.from_bytes(os.urandom(8), "little")
REPORT: Final = struct.Struct("<Qq")  # address of the failed row, its result (minus errno)

# long run(row *rows, report *report, long clone_flags, int *pidfd), System V calling convention.
# A row is ten 64-bit words: number, six arguments, where to store the low half of the result, the
# lowest and the highest good result. `tests/test_sandbox_calls.py` assembles this source.
SOURCE: Final = """
        push    rbx
        push    r12
        mov     rbx, rdi
        mov     r12, rsi
        test    rdx, rdx                # no flags: in this process
        jz      next
        mov     rdi, rdx                # clone(flags, stack, parent_tid, child_tid, tls)
        xor     esi, esi                # the parent's stack, which the child leaves alone
        mov     rdx, rcx
        xor     r10d, r10d
        xor     r8d, r8d
        mov     eax, 56
        syscall
        test    rax, rax
        jnz     done                    # the parent
next:   mov     rax, [rbx]
        test    rax, rax                # -1: the end
        js      done
        mov     rdi, [rbx+8]
        mov     rsi, [rbx+16]
        mov     rdx, [rbx+24]
        mov     r10, [rbx+32]
        mov     r8, [rbx+40]
        mov     r9, [rbx+48]
        syscall
        mov     rcx, [rbx+56]
        mov     [rcx], eax
        cmp     rax, [rbx+64]
        jl      fail
        cmp     rax, [rbx+72]
        jg      fail
        add     rbx, 80
        jmp     next
fail:   mov     [r12], rbx
        mov     [r12+8], rax
        mov     edi, 8                  # write(STATUS_FD, report, 16)
        mov     rsi, r12
        mov     edx, 16
        mov     eax, 1
        syscall
        mov     edi, 127                # exit_group(127)
        mov     eax, 231
        syscall
done:   pop     r12
        pop     rbx
        ret
"""
CODE: Final = bytes.fromhex(
    "5341544889fb4989f44885d2741a4889d731f64889ca4531d24531c0b838"
    "0000000f054885c07563488b034885c0785b488b7b08488b7310488b5318"
    "4c8b53204c8b43284c8b4b300f05488b4b388901483b43407c0c483b4348"
    "7f064883c350ebc649891c244989442408bf080000004c89e6ba10000000"
    "b8010000000f05bf7f000000b8e70000000f05415c5bc3"
)

_ROW_BYTES: Final = 80
_ANY: Final = (1 << 63) - 1
_U64: Final = (1 << 64) - 1
_END: Final = _U64
_CLONE_PIDFD, _CLONE_VFORK, _CLONE_VM, _CLONE_FILES, _SIGCHLD = 0x1000, 0x4000, 0x100, 0x400, 17


def _load_code() -> Any:
    """The machine code as a function: written, then executable, never both."""
    pages = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.write(CODE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), 5):  # READ, EXEC
        code = ctypes.get_errno()
        raise OSError(code, f"cannot make code executable: {os.strerror(code)}")
    kind = ctypes.CFUNCTYPE(
        ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p
    )
    run = kind(address)
    run.pages = pages  # type: ignore[attr-defined]  # kept for as long as the function
    return run


_run = _load_code()


class Calls:
    """A table of system calls. Pointers are to buffers that `keep` holds until it is dropped."""

    def __init__(self) -> None:
        self._words = array.array("Q")
        self._stages: list[str] = []
        self._kept: list[object] = []
        self._scratch = array.array("Q", [0, 0, 0])  # an unwanted result; the report
        self._nowhere = self._scratch.buffer_info()[0]
        self._at = 0

    def add(
        self, stage: str, name: str, *arguments: int, equals: int | None = None, store: int = 0
    ) -> None:
        """`name(arguments)`; it fails unless the result is `equals` (default: not negative). The
        low half of the result goes to address `store`. `stage` is what a failure is called."""
        padded = [argument & _U64 for argument in arguments]
        if len(padded) < 6:
            padded += [0] * (5 - len(padded)) + [PASSAGE]
        low, high = (0, _ANY) if equals is None else (equals, equals)
        row = [syscalls()[name], *padded, store or self._nowhere, low, high]
        self._words.extend(row)
        self._stages.append(stage)

    def pointer(self, data: bytes) -> int:
        """The address of a copy of `data`."""
        buffer = ctypes.create_string_buffer(data, len(data))
        self._kept.append(buffer)
        return ctypes.addressof(buffer)

    def keep(self, buffer: object) -> None:
        self._kept.append(buffer)

    def seal(self) -> None:
        """Ends the table: it may not move in memory any more."""
        self._words.append(_END)
        self._at = self._words.buffer_info()[0]

    def run_in_new_process(self, share_descriptors: bool = False) -> tuple[int, int]:
        """(pid, pidfd) of a child that works off the table, whose last call is an exec or an exit.
        This process waits until the child has passed it, or has failed. OSError if there is no
        child. With `share_descriptors` what it opens is this process's too.

        No signal may have a handler here: it would run in the child, on this process's memory.
        """
        pidfd = ctypes.c_int(-1)
        flags = _CLONE_PIDFD | _CLONE_VFORK | _CLONE_VM | _SIGCHLD
        flags |= _CLONE_FILES * share_descriptors
        pid = _run(self._at, self._nowhere + 8, flags, ctypes.addressof(pidfd))
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid))
        return pid, pidfd.value

    def run(self) -> None:
        """Works it off in this process, which ends if a call fails."""
        _run(self._at, self._nowhere + 8, 0, 0)

    def try_in_new_process(self, then: Callable[[int], None] | None = None) -> None:
        """Works it off in a child that ends with it, and is waited for; what it opens is this
        process's too. `then` is called with the dead child's pid. OSError if a call fails: its
        filename is the stage."""
        self.add("exit", "exit_group", 0)
        self.seal()
        everything = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid, pidfd = self.run_in_new_process(share_descriptors=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, everything)
        os.close(pidfd)
        try:
            if self._scratch[1]:  # the report, which the child wrote into this memory
                stage, code = self.failure(self._scratch[1:].tobytes())
                raise OSError(code, os.strerror(code), stage)
            if then is not None:
                then(pid)
        finally:
            os.waitpid(pid, 0)

    def failure(self, report: bytes) -> tuple[str, int]:
        """(stage, errno or 0) of what was read from the other end of STATUS_FD."""
        address, result = REPORT.unpack(report)
        return self._stages[(address - self._at) // _ROW_BYTES], max(0, -result)
