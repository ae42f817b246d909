"""The link between our own processes: descriptors that go with messages, and those that do not."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import Struct

from piehost.wire.link import Link, LinkClosed


class Note(Struct):
    text: str


@contextlib.contextmanager
def no_more_descriptors_than(spare: int) -> Iterator[None]:
    """Beside those open now."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(open_now())
    fillers = [os.dup(0)]
    while fillers[-1] <= highest:  # the numbers in between
        fillers.append(os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1] + 1 + spare, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in fillers:
            os.close(fd)


def open_now() -> set[int]:
    found = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    return {fd for fd in found if _is_open(fd)}  # less the folder's own


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.fixture
def ends() -> Iterator[tuple[Link[Note], Link[Note]]]:
    pair = socket.socketpair()
    one, other = (Link[Note](end, Note) for end in pair)
    yield one, other
    one.close()
    other.close()


def test_a_message_whose_descriptors_do_not_fit_leaves_none_open(
    ends: tuple[Link[Note], Link[Note]],
) -> None:
    one, other = ends
    with no_more_descriptors_than(3):
        for _ in range(3):
            with pytest.raises(OSError, match="Too many open files"):
                one.send(Note("five"), [0] * 5)
        one.send(Note("three"), [0] * 3)
    ((message, fds),) = other.receive()
    for fd in fds:
        os.close(fd)
    assert (message.text, len(fds)) == ("three", 3)


def test_what_was_not_sent_is_closed_with_the_link() -> None:
    before = open_now()
    pair = socket.socketpair()
    one, other = (Link[Note](end, Note) for end in pair)
    while not one.backlog:
        one.send(Note("x" * 100000))
    one.send(Note("last"), [0, 0])
    one.close()
    other.close()
    assert open_now() == before


def test_what_was_queued_for_a_peer_that_died_is_closed_with_the_link() -> None:
    before = open_now()
    pair = socket.socketpair()
    one, other = (Link[Note](end, Note) for end in pair)
    other.close()
    with pytest.raises(LinkClosed):
        one.send(Note("late"), [0])
    one.close()
    assert open_now() == before


def test_a_controller_waits_on_links_of_any_number() -> None:
    """They have the numbers of the host's descriptors, of which a busy one has thousands open."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, limits[1]))
    with contextlib.ExitStack() as ours:
        ours.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        high = []
        for _ in range(2):
            for end in socket.socketpair():
                ours.enter_context(end)
            high.append(fcntl.fcntl(end, fcntl.F_DUPFD, 1100))
            ours.callback(os.close, high[-1])
        options = ["--host-fd", str(high[0]), "--backend-fd", str(high[1])]
        process = subprocess.Popen(
            [sys.executable, "-m", "piehost.controller", *options],
            pass_fds=high,
            stderr=subprocess.PIPE,
        )
    _, said = process.communicate(timeout=60)  # it waits for its host, whose end is closed now
    assert process.returncode == 0, said.decode()
