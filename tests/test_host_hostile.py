"""Clients that misbehave, and inferlets that look for what is not theirs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from piehost.host.client import Client
from piehost.host.errors import FailedAnswer, Refused
from piehost.wire import client as wire

from .host_harness import (
    DEADLINE,
    SCRIPTED,
    WAIT,
    Server,
    Terminal,
    compile_c,
    eventually,
    write_program,
)

SEARCH = """
    import ctypes, gc, sys
    from inferlet import args, receive, send

    receive().result()
    terces = args()[0][::-1].encode() + b"-fo-2retnuh"  # backwards, or it would find itself
    found, frame = [], sys._getframe()
    while frame:
        found.append(repr(dict(frame.f_locals)).encode())
        frame = frame.f_back
    found += [repr(thing).encode() for thing in gc.get_objects() if "Spawn" in str(type(thing))]
    unwritten = ctypes.pythonapi.PyBytes_FromStringAndSize  # shows what was freed before
    unwritten.restype = ctypes.py_object
    found += [unwritten(None, size) for size in range(16, 4096, 16) for _ in range(40)]
    send(str(sum(terces in each[::-1] for each in found)))
"""


class Raw:
    """A connection that says what it likes."""

    def __init__(self, server: Server) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"ipc://{server.socket}")

    def say(self, message: Any) -> None:
        self.socket.send(msgspec.msgpack.encode(message))

    def hear(self) -> Any:
        assert self.socket.poll(DEADLINE * 1000)
        return msgspec.msgpack.decode(self.socket.recv(), type=wire.HostToClient)

    def close(self) -> None:
        self.socket.close()
        self._context.term()


@pytest.fixture
def raw(server: Server) -> Iterator[Raw]:
    connection = Raw(server)
    yield connection
    connection.close()


@pytest.mark.parametrize(
    "octets",
    [
        b"",
        b"\xc1",
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        *(
            msgspec.msgpack.encode(message)
            for message in (
                ["hello", -1],
                ["hello", 1 << 40],
                ["hello", (1 << 64) - 1],
                ["launch", 1, "/x", []],  # before its hello
                ["nonsense"],
                {"hello": 1},
            )
        ),
    ],
)
def test_garbage_is_answered_and_others_are_served(raw: Raw, client: Client, octets: bytes) -> None:
    raw.socket.send(octets)
    answer = raw.hear()
    assert isinstance(answer, wire.Failed) and answer.reason.code == "bad_message"
    assert client.inferlets() == []


def test_message_in_many_parts(raw: Raw, client: Client) -> None:
    raw.socket.send_multipart([b"part"] * 1000)
    assert raw.hear().reason.code == "bad_message"
    assert client.inferlets() == []


@pytest.mark.parametrize(
    "path", ["/a\0b", "", "relative", "/dev/zero", "/proc/self/mem", "/" * 9000]
)
def test_programs_that_are_none(raw: Raw, path: str) -> None:
    raw.say(wire.Hello(os.getpid()))
    raw.say(wire.Launch(7, path, []))
    answer = raw.hear()
    assert isinstance(answer, wire.Failed) and answer.request == 7 and answer.code in (126, 127)


def test_launches_that_cannot_be(client: Client, tmp_path: Path) -> None:
    path = write_program(tmp_path, "hello.py", "print('ran')")
    with pytest.raises(FailedAnswer, match="null character"):
        client.launch(path, ["a\0b"]).result(DEADLINE)
    with pytest.raises(FailedAnswer, match="no sandbox control 'nonsense'"):
        client.launch(path, waived=["nonsense"]).result(DEADLINE)
    with pytest.raises(Refused, match="too long"):
        client.launch(path, ["x" * 100_000] * 100)
    assert client.launch(path, ["x" * 100_000] * 10).result(DEADLINE).code == 0


def test_message_that_is_too_long(raw: Raw, client: Client, tmp_path: Path) -> None:
    path = write_program(tmp_path, "wait.py", WAIT)
    with pytest.raises(Refused, match="60001 octets"):
        client.launch(path).send(b"x" * 60_001)
    raw.say(wire.Hello(os.getpid()))
    raw.say(wire.Launch(1, str(path), []))
    raw.say(wire.Input(1, b"x" * 60_001))
    ended = next(m for m in iter(raw.hear, None) if isinstance(m, wire.Ended))
    assert ended.reason is not None and ended.reason.code == "input"


def test_client_that_sends_without_end(client: Client, tmp_path: Path) -> None:
    """Also in the smallest of messages: each costs memory besides its octets."""
    run = client.launch(compile_c(tmp_path, "pause", PAUSE))
    while not run.id:
        client.pump(DEADLINE)
    for _ in range(wire.MAX_UNREAD_BYTES // wire.MESSAGE_OVERHEAD + 1):
        run.send(b"")
    result = run.result(DEADLINE)
    assert result.reason is not None and result.reason.code == "input"


PAUSE = "#include <unistd.h>\nint main(void) { for (;;) sleep(60); }"


def test_stdin_waits_for_a_program_that_does_not_receive(server: Server, tmp_path: Path) -> None:
    process = server.terminal.start("launch", compile_c(tmp_path, "pause", PAUSE))
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)
    line = b"x" * 4095 + b"\n"  # a pipe takes all of it or nothing
    written = 0

    def blocked() -> bool:
        nonlocal written
        for _ in range(200):  # until nothing more was taken for as long as `eventually` sleeps
            try:
                written += os.write(process.stdin.fileno(), line)  # type: ignore[union-attr]
            except BlockingIOError:
                return written > wire.INPUT_WINDOW
        assert written < 16 * wire.INPUT_WINDOW, "nobody holds it up"
        return False

    assert eventually(blocked)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=DEADLINE)
    assert process.returncode == 130


def test_stdin_of_many_windows_arrives_whole(server: Server, tmp_path: Path) -> None:
    source = """
        from inferlet import receive, send
        from inferlet.errors import ClosedError

        octets = 0
        try:
            while True:
                octets += len(receive().result())
        except ClosedError:
            send(str(octets))
    """
    path = write_program(tmp_path, "count.py", source)
    lines = 100 * wire.INPUT_WINDOW // 20_000 // 20
    stdin = (b"x" * 20_000 + b"\n") * lines + b"\n" * 5000
    done = server.terminal.run("launch", path, stdin=stdin, check=0)
    assert done.stdout == b"%d\n" % (20_000 * lines)


def test_script_finds_no_arguments_of_others(client: Client, tmp_path: Path) -> None:
    """A fork of the zygote has all that the zygote ever read and did not write over."""
    search = write_program(tmp_path, "search.py", SEARCH)
    secrets = ["hunter2-of-me " * size for size in range(1, 60)]
    others = [client.launch(search, ["other", *secrets]) for _ in range(3)]
    spy = client.launch(search, ["me"])
    spy.send(b"go")
    assert spy.result(DEADLINE).text == "0"
    for run in others:
        run.cancel()
        run.result(DEADLINE)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(server: Server, tmp_path: Path, closed: str) -> None:
    path = write_program(tmp_path, "hello.py", "from inferlet import send; send('hello')")
    done = server.terminal.shell(f'"$@" launch {path} {closed}')
    assert done.returncode == 0, done.stderr
    assert done.stdout == (b"" if ">&-" in closed.split() else b"hello\n")


def test_more_launches_than_there_are_descriptors(terminal: Terminal, tmp_path: Path) -> None:
    """Those that do not fit are refused; those that run, and later ones, are served."""
    wait = write_program(tmp_path, "wait.py", WAIT)
    with terminal.server(*SCRIPTED, descriptors=200) as server, server.client() as client:
        runs = [client.launch(wait) for _ in range(60)]
        while not all(run.id or run.over for run in runs):
            client.pump(DEADLINE)
        refused = [run for run in runs if run.over]
        assert 0 < len(refused) < 60
        with pytest.raises(FailedAnswer, match="run or wait already"):
            refused[0].result()
        started = [run for run in runs if run.id]
        for run in started:
            run.send(b"go")
        assert [run.result(DEADLINE).code for run in started] == [0] * len(started)
        late = client.launch(wait)
        late.send(b"go")
        assert late.result(DEADLINE).code == 0


def test_an_exit_before_the_signal_is_no_success(client: Client, tmp_path: Path) -> None:
    """Its connection ends first: a program that then exits with 0 was ended all the same."""
    source = """
        #include <unistd.h>
        int main(void)
        {
            char octet;
            write(3, "\\0\\2\\x91\\xc1", 4);
            return read(3, &octet, 1) > 0;
        }
    """
    program = compile_c(tmp_path, "hasty", source)
    for _ in range(10):
        result = client.launch(program).result(timeout=DEADLINE)
        assert result.reason is not None and result.reason.code == "bad_frame"
        assert result.code == 128 + signal.SIGKILL
