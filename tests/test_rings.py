"""Rings and sealed blocks: who can write what, and who cannot."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from piehost.host.shm import (
    RingReader,
    RingWriter,
    create_ring,
    create_ring_in,
    seal_ring,
    sealed_memfd,
)

SIZE = 2 * mmap.PAGESIZE
F_SEAL_FUTURE_WRITE = 0x10

# what an inferlet could try with the descriptor it gets; prints one line an attempt
_ATTACKS = """
import ctypes, mmap, os, sys
fd, size = int(sys.argv[1]), int(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)

def attempt(name, act):
    try:
        act()
    except (OSError, ValueError) as error:
        print(name, "refused")
    else:
        print(name, "worked")

attempt("map", lambda: mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE))
attempt("write", lambda: os.pwrite(fd, b"x", 0))
attempt("shrink", lambda: os.ftruncate(fd, 0))
attempt("grow", lambda: os.ftruncate(fd, 2 * size))
def reopen():
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    mmap.mmap(again, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
attempt("reopen", reopen)
def protect():
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
    at = libc.mmap(None, size, 1, 1, fd, 0)
    if libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(size), 3):
        raise OSError(ctypes.get_errno(), "mprotect")
attempt("protect", protect)
view = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
print("sees", view[:5])
sys.stdin.read()
print("sees", view[:5])
"""


def attack(fd: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _ATTACKS, str(fd), str(SIZE)],
        pass_fds=(fd,),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def lines(child: subprocess.Popen[str], count: int) -> list[str]:
    assert child.stdout is not None
    return [child.stdout.readline().strip() for _ in range(count)]


def test_a_sealed_ring_is_read_only_for_the_inferlet_and_writable_for_the_backend() -> None:
    fd = create_ring("test", SIZE)
    writer = RingWriter(fd, SIZE)
    assert writer.write(0, b"hello")
    seal_ring(fd)
    child = attack(fd)
    attempts = ("map", "write", "shrink", "grow", "reopen", "protect")
    assert lines(child, 7) == [*(f"{name} refused" for name in attempts), "sees b'hello'"]
    assert writer.write(0, b"there")
    assert child.communicate("")[0].strip() == "sees b'there'"
    writer.close()
    os.close(fd)


def test_an_unsealed_ring_would_be_writable() -> None:
    """The attempts above can succeed: it is the seal that stops them."""
    fd = create_ring("test", SIZE)
    child = attack(fd)
    assert lines(child, 2) == ["map worked", "write worked"]
    child.communicate("")
    os.close(fd)


def test_nobody_can_map_a_sealed_ring_for_writing_not_even_the_host() -> None:
    fd = create_ring("test", SIZE)
    seal_ring(fd)
    with pytest.raises(PermissionError):
        RingWriter(fd, SIZE)
    os.close(fd)


def test_writes_stay_inside_the_ring() -> None:
    fd = create_ring("test", SIZE)
    writer = RingWriter(fd, SIZE)
    assert writer.write(SIZE - 4, b"last")
    assert not writer.write(SIZE - 3, b"last")
    assert not writer.write(-4, b"last")
    assert os.pread(fd, 8, SIZE - 8) == b"\0\0\0\0last"
    writer.close()
    os.close(fd)


def test_a_ring_in_is_writable_for_the_inferlet_and_keeps_its_size() -> None:
    fd = create_ring_in("test", SIZE)
    reader = RingReader(fd, SIZE)
    os.pwrite(fd, b"hello", 0)
    child = attack(fd)
    assert lines(child, 7) == [
        "map worked",
        "write worked",
        "shrink refused",
        "grow refused",
        "reopen worked",
        "protect worked",
        "sees b'xello'",
    ]
    child.communicate("")
    assert reader.read(0, 5) == b"xello"
    for seal in (fcntl.F_SEAL_WRITE, F_SEAL_FUTURE_WRITE):  # it cannot be taken from an inferlet
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
    reader.close()
    os.close(fd)


def test_what_was_read_from_a_ring_in_does_not_change_any_more() -> None:
    fd = create_ring_in("test", SIZE)
    reader = RingReader(fd, SIZE)
    os.pwrite(fd, b"first", 100)
    copy = reader.read(100, 5)
    os.pwrite(fd, b"later", 100)
    assert copy == b"first" and reader.read(100, 5) == b"later"
    reader.close()
    os.close(fd)


def test_reads_stay_inside_the_ring() -> None:
    fd = create_ring_in("test", SIZE)
    reader = RingReader(fd, SIZE)
    os.pwrite(fd, b"last", SIZE - 4)
    assert reader.read(SIZE - 4, 4) == b"last"
    assert reader.read(SIZE, 0) == b""
    assert reader.read(SIZE - 4, 5) is None
    assert reader.read(-4, 4) is None and reader.read(4, -4) is None
    assert reader.read(1 << 62, 4) is None
    reader.close()
    os.close(fd)


@pytest.mark.parametrize("create", [create_ring, create_ring_in])
@pytest.mark.parametrize("size", [0, -1, mmap.PAGESIZE + 1])
def test_a_ring_is_whole_pages(create: Callable[[str, int], int], size: int) -> None:
    with pytest.raises(ValueError, match="multiple"):
        create("test", size)


@pytest.mark.parametrize("side", [RingWriter, RingReader])
def test_a_ring_of_another_size_or_one_that_could_shrink_is_not_mapped(
    side: Callable[[int, int], object],
) -> None:
    fd = create_ring("test", SIZE)
    with pytest.raises(ValueError, match="announced"):
        side(fd, 2 * SIZE)
    os.close(fd)
    plain = os.memfd_create("test")
    os.ftruncate(plain, SIZE)
    with pytest.raises(ValueError, match="shrunk"):
        side(plain, SIZE)
    os.close(plain)


def test_a_sealed_block_holds_its_bytes_for_ever() -> None:
    data = os.urandom(3 * mmap.PAGESIZE + 5)
    fd = sealed_memfd("block", data)
    assert os.read(fd, len(data) + 1) == data
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, len(data), mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.fcntl(fd, 1033, 0) == -1  # F_ADD_SEALS
    assert ctypes.get_errno() == errno.EPERM
    os.close(fd)
