"""Kernel interfaces that Python has no names for: seccomp, Landlock, prctl. They raise OSError."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import Final

from .policy import syscalls

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

_UNSHARE = syscalls()["unshare"]
_SECCOMP = syscalls()["seccomp"]
_LANDLOCK_CREATE = syscalls()["landlock_create_ruleset"]
_LANDLOCK_ADD = syscalls()["landlock_add_rule"]

_PR_SET_NAME: Final = 15
_PR_SET_NO_NEW_PRIVS: Final = 38

_SECCOMP_SET_MODE_FILTER: Final = 1
_SECCOMP_GET_ACTION_AVAIL: Final = 2
_SECCOMP_FILTER_FLAG_NEW_LISTENER: Final = 8
_SECCOMP_IOCTL_NOTIF_RECV: Final = 0xC0502100
# struct seccomp_notif: u64 id; u32 pid, flags; then seccomp_data: int nr; u32 arch; ...
_NOTIFICATION: Final = struct.Struct("<QIIiI56x")

_LANDLOCK_CREATE_RULESET_VERSION: Final = 1
_LANDLOCK_RULE_PATH_BENEATH: Final = 1


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def set_no_new_privs() -> None:
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def set_process_name(name: str) -> None:
    """What `ps` and `top` show; 15 octets."""
    _check(_libc.prctl(_PR_SET_NAME, os.fsencode(name)[:15], 0, 0, 0))


def unshare(flags: int) -> None:
    _check(_syscall(_UNSHARE, ctypes.c_ulong(flags)))


# --- seccomp -----------------------------------------------------------------------------------


def check_seccomp() -> None:
    """OSError if the kernel cannot filter system calls and kill for them."""
    action = ctypes.byref(ctypes.c_uint32(0x80000000))  # SECCOMP_RET_KILL_PROCESS
    _check(_syscall(_SECCOMP, _SECCOMP_GET_ACTION_AVAIL, 0, action))


class SeccompProgram:
    """A filter's code in memory that can still be written to until it is loaded."""

    def __init__(self, code: bytes) -> None:
        self._buffer = ctypes.create_string_buffer(code, len(code))
        self.code = memoryview(self._buffer).cast("B")
        self.code_address = ctypes.addressof(self._buffer)
        self._program = _Program(len(code) // 8, self.code_address)
        self.address = ctypes.addressof(self._program)  # struct sock_fprog

    def load_with_listener(self) -> int:
        """The descriptor on which NOTIFY answers of the filter arrive.

        OSError EBUSY if a filter with a listener is above this process already.
        """
        flags = _SECCOMP_FILTER_FLAG_NEW_LISTENER
        return _check(
            _syscall(_SECCOMP, _SECCOMP_SET_MODE_FILTER, flags, ctypes.c_void_p(self.address))
        )


def receive_notification(listener: int) -> tuple[int, int] | None:
    """(thread id, system call) of a caller that waits, or None if it is gone already."""
    buffer = bytearray(_NOTIFICATION.size)
    try:
        fcntl.ioctl(listener, _SECCOMP_IOCTL_NOTIF_RECV, buffer)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR):
            return None
        raise
    _, thread, _, number, _ = _NOTIFICATION.unpack(buffer)
    return thread, number


# --- Landlock ----------------------------------------------------------------------------------


def landlock_abi() -> int:
    """The version of the kernel's Landlock. OSError if it has none or it is switched off."""
    return _check(
        _syscall(_LANDLOCK_CREATE, None, ctypes.c_ulong(0), _LANDLOCK_CREATE_RULESET_VERSION)
    )


def landlock_create(attributes: bytes) -> int:
    """A ruleset's descriptor; `attributes` is struct landlock_ruleset_attr."""
    return _check(_syscall(_LANDLOCK_CREATE, attributes, ctypes.c_ulong(len(attributes)), 0))


def landlock_allow(ruleset: int, fd: int, access: int) -> None:
    """Grants `access` on the file `fd`, or on all beneath the folder `fd`."""
    rule = struct.pack("<Qi", access, fd)  # struct landlock_path_beneath_attr, packed
    _check(_syscall(_LANDLOCK_ADD, ruleset, _LANDLOCK_RULE_PATH_BENEATH, rule, 0))
