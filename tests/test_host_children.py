"""Children: inferlets that inferlets spawn. Real processes, and frames written by hand."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from piehost.host.client import Client, Run

from .host_harness import (
    DEADLINE,
    SCRIPTED,
    Server,
    all_gone,
    compile_c,
    eventually,
    new_terminal,
    processes,
    started,
    write_program,
)
from .raw_inferlet import DYNASTY, write_raw

BAD_ARGUMENT, OVER_QUOTA, NOT_FOUND, UNAVAILABLE = 5, 7, 16, 17

# a family three deep that says when all of it runs, and then waits for ever


def texts(run: Run) -> list[str]:
    result = run.result(DEADLINE)
    assert result.code == 0, result
    return [message.decode() for message in result.messages]


@pytest.fixture(scope="module")
def victim() -> Iterator[Server]:
    """A server that gets hurt."""
    with new_terminal() as terminal, terminal.server(*SCRIPTED) as running:
        yield running


def test_a_child_speaks_with_its_parent_and_ends(client: Client, tmp_path: Path) -> None:
    source = """
        if sys.argv[1:] == ["child"]:
            request = ask(RECEIVE)
            say(f"{startup['user']} {startup['job']} {startup['id']}")
            print("out of the child", flush=True)
            sys.exit(len(request))
        name = ask(SPAWN, 1, "", ["child"])
        ask(SEND_CHILD, 1, b"seven..")
        user, job, own = ask(RECEIVE_CHILD, 1).decode().split()
        say(ask(WAIT_CHILD, 1))
        say(failure(RECEIVE_CHILD, 1))
        say((user, job, own) == (startup["user"], startup["job"], name))
        say(startup["job"] == startup["id"] != name)
        ask(END_CHILD, 1)
        say(failure(WAIT_CHILD, 1))
    """
    run = client.launch(write_raw(tmp_path, "parent.py", source), user="ada")
    result = run.result(DEADLINE)
    assert [m.decode() for m in result.messages] == ["7", "14", "True", "True", "2"]
    assert (result.code, result.stdout, result.stderr) == (0, b"out of the child\n", b"")


def test_a_child_that_the_manifest_names(client: Client, tmp_path: Path) -> None:
    write_raw(
        tmp_path,
        "main.py",
        """
        ask(SPAWN, 1, "worker", ["a", "b"])
        say(ask(WAIT_CHILD, 1))
        for name in ("nobody", "main.py", "../main", "missing", "outside", "text", "loop"):
            say(f"{name} {failure(SPAWN, 2, name)}")
        """,
    )
    compile_c(tmp_path, "worker", "int main(int n, char **v) { return n * 10 + (v[2][0] == 'b'); }")
    write_program(tmp_path, "text", "no program")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "inferlet.toml").write_text(
        'entry = "main.py"\n[children]\nworker = "worker"\nmissing = "missing"\ntext = "text"\n'
        'outside = "/bin/true"\nloop = "loop"\n'
    )
    assert texts(client.launch(tmp_path)) == [
        "31",
        *(f"{name} {NOT_FOUND}" for name in ("nobody", "main.py", "../main")),
        *(f"{name} {UNAVAILABLE}" for name in ("missing", "outside", "text", "loop")),
    ]


def test_spawning_what_cannot_be(client: Client, tmp_path: Path) -> None:
    source = r"""
        say(failure(SPAWN, 1, "", ["a\0b"]))
        say(failure(SPAWN, 1, "x"))
        say(failure(WAIT_CHILD, 1))
    """
    program = write_raw(tmp_path, "parent.py", source)
    assert texts(client.launch(program)) == [str(BAD_ARGUMENT), str(NOT_FOUND), "2"]
    none = write_raw(tmp_path, "none.py", "say(failure(SPAWN, 1))")
    assert texts(client.launch(none, [], {"children": "0"})) == [str(OVER_QUOTA)]


def test_a_child_that_cannot_start(client: Client, tmp_path: Path) -> None:
    """Its launcher refuses it: the parent is told why, and can spawn others under that handle."""
    source = r"""
        #include <unistd.h>
        static const char frames[] =
            "\x00\x0c\x91\x94\x24\x01\x01\xa6" "script"        // spawn child 1: script
            "\x00\x09\x91\x95\x24\x02\x01\xa0\x91\xa1" "x";  // spawn child 1: this, with an x
        int main(int argc, char **argv) {
            char answer[4096];
            if (argc > 1) return 0;
            for (int at = 0; at < 25; at += 14) {
                if (write(3, frames + at, at ? 11 : 14) < 0) return 1;
                long size = read(3, answer, sizeof answer);
                if (size <= 0 || write(1, answer, size) != size || write(1, "\n", 1) != 1) return 2;
            }
            return 0;
        }
    """
    compile_c(tmp_path, "parent", source)
    write_raw(tmp_path, "script.py", "")
    (tmp_path / "inferlet.toml").write_text(
        'entry = "parent"\n[children]\nscript = "script.py"\n[quota]\naddress_space = "16MiB"\n'
    )
    result = client.launch(tmp_path).result(DEADLINE)
    assert result.code == 0, result
    refused, spawned = result.stdout.split(b"\n", 1)
    assert bytes([UNAVAILABLE]) in refused and b"16 MiB of address space" in refused
    assert b"test_a_child_that_cannot_start0-" in spawned and len(spawned) < 50


def test_how_children_end(client: Client, tmp_path: Path) -> None:
    source = """
        if sys.argv[1:] == ["crash"]:
            os.abort()
        if sys.argv[1:] == ["wait"]:
            say("ready")
            ask(RECEIVE)
        if sys.argv[1:] == ["fail"]:
            sys.exit(5)
        for child, how in enumerate(("crash", "fail"), 1):
            ask(SPAWN, child, "", [how])
            say(ask(WAIT_CHILD, child))
        for child in (3, 4):
            ask(SPAWN, child, "", ["wait"])
            say(ask(RECEIVE_CHILD, child).decode())
        waiting = post(WAIT_CHILD, 3)
        ask(END_CHILD, 3)
        try:
            take(waiting)
        except Failed as error:
            say(error.code)
        ask(SPAWN, 3, "", ["fail"])  # the handle is free again
        say(ask(WAIT_CHILD, 3))
        ask(CLOSE_CHILD, 4)
        say(ask(WAIT_CHILD, 4))  # its receive fails with `closed`
    """
    program = write_raw(tmp_path, "parent.py", source)
    ready = ["ready", "ready"]
    assert texts(client.launch(program)) == [str(128 + signal.SIGABRT), "5", *ready, "14", "5", "1"]
    assert eventually(lambda: not client.inferlets())


def test_descendants_end_with_their_parent(client: Client, tmp_path: Path) -> None:
    program = write_raw(tmp_path, "dynasty.py", DYNASTY)
    run = started(client, program, "0")
    listed = {inferlet.id: inferlet for inferlet in client.inferlets()}
    child = next(i for i in listed.values() if i.parent == run.id)
    grandchild = next(i for i in listed.values() if i.parent == child.id)
    assert listed[run.id].parent == "" and len(listed) == 3
    assert {i.job for i in listed.values()} == {run.id}
    family = processes(client)
    run.cancel()
    reason = run.result(DEADLINE).reason
    assert reason is not None and reason.code == "cancelled"
    assert all_gone(family), "the client hears the end when all are gone"
    assert client.inferlets() == [] and grandchild.pid != child.pid


def test_a_parent_that_exits_takes_its_children_along(client: Client, tmp_path: Path) -> None:
    source = """
        if len(sys.argv) > 1:
            print("a child", flush=True)
            say("ready")
            time.sleep(3600)
        for child in range(1, 5):
            ask(SPAWN, child, "", ["child"])
            ask(RECEIVE_CHILD, child)
        post(SPAWN, 9, "", ["late"])  # nobody waits for it
        sys.exit(3)
    """
    result = client.launch(write_raw(tmp_path, "parent.py", source)).result(DEADLINE)
    assert (result.code, result.reason) == (3, None)
    assert result.stdout.count(b"a child\n") >= 4
    assert eventually(lambda: not client.inferlets())
    assert eventually(lambda: client.stats().controller.seats == 0)


def test_a_middle_one_that_dies_takes_its_own_along_only(client: Client, tmp_path: Path) -> None:
    source = """
        generation = int(sys.argv[1])
        if generation < 2:
            ask(SPAWN, 1, "", [str(generation + 1)])
            say(ask(RECEIVE_CHILD, 1).decode())
        else:
            say("ready")
        if generation:
            time.sleep(3600)
        say(ask(WAIT_CHILD, 1))
    """
    run = started(client, write_raw(tmp_path, "dynasty.py", source), "0")
    listed = client.inferlets()
    child = next(i for i in listed if i.parent == run.id)
    grandchild = psutil.Process(next(i for i in listed if i.parent == child.id).pid)
    client.stop(child.id)
    result = run.result(DEADLINE)
    assert result.code == 0 and result.messages == [str(128 + signal.SIGKILL).encode()]
    assert all_gone([grandchild])


def test_a_spawn_bomb_is_bounded(client: Client, tmp_path: Path) -> None:
    """Every one spawns as many as it can, without waiting; `children` holds for all together."""
    source = """
        asked = [post(SPAWN, child, "", [str(int(sys.argv[1]) + 1)]) for child in range(1, 40)]
        codes = []
        for request in asked:
            try:
                take(request)
                codes.append(0)
            except Failed as error:
                codes.append(error.code)
        print(f"{codes.count(0)} {sorted(set(codes) - {0})}", flush=True)
        if sys.argv[1] == "0":
            ask(RECEIVE)
        time.sleep(3600)
    """
    before = client.stats()
    run = client.launch(write_raw(tmp_path, "bomb.py", source), ["0"], {"children": "6"})
    out = b""
    for event in run.events():
        out += getattr(event, "data", b"")
        if out.count(b"\n") == 7:
            break
    lines = [line.split(maxsplit=1) for line in out.decode().splitlines()]
    assert sum(int(spawned) for spawned, _ in lines) == 6
    assert {codes for _, codes in lines} == {f"[{OVER_QUOTA}]"}
    family = processes(client)
    assert len(family) == 7
    run.cancel()
    run.result(DEADLINE)
    assert all_gone(family)
    assert eventually(lambda: client.stats().controller.seats == before.controller.seats)


def test_children_one_after_the_other(client: Client, tmp_path: Path) -> None:
    """The quota counts those that live; and none of their accounts stays behind."""
    source = """
        if len(sys.argv) > 1:
            sys.exit(0)
        for turn in range(30):
            ask(SPAWN, 1, "", ["child"])
            assert ask(WAIT_CHILD, 1) == 0
            ask(END_CHILD, 1)
        say(ask(QUOTA)["children"])
    """
    program = write_raw(tmp_path, "parent.py", source)
    before = client.stats()
    assert texts(client.launch(program, [], {"children": "1"})) == ["1"]
    assert eventually(lambda: client.stats().controller.seats == 0)
    assert client.stats().launches == before.launches + 31


def test_the_client_dies(server: Server, client: Client, tmp_path: Path) -> None:
    program = write_raw(tmp_path, "dynasty.py", DYNASTY)
    process = server.terminal.start_ready("launch", program, "--", "0")
    family = processes(client)
    assert len(family) == 3
    process.kill()
    process.communicate(timeout=DEADLINE)
    assert eventually(lambda: all_gone(family))
    assert eventually(lambda: not client.inferlets())


def test_a_killed_launcher_is_the_end_of_its_children_only(victim: Server, tmp_path: Path) -> None:
    write_raw(
        tmp_path,
        "main.py",
        """
        ask(SPAWN, 1, "worker")
        say("ready")
        say(ask(WAIT_CHILD, 1))
        """,
    )
    compile_c(
        tmp_path, "worker", "#include <unistd.h>\nint main(void) { char c; return read(3, &c, 1); }"
    )
    (tmp_path / "inferlet.toml").write_text('entry = "main.py"\n[children]\nworker = "worker"\n')
    with victim.client() as client:
        run = started(client, tmp_path)
        victim.kill("launcher")
        result = run.result(DEADLINE)
        assert result.code == 0 and result.messages == [b"125"]


@pytest.mark.parametrize("name", ["backend", "controller"])
def test_a_killed_core_is_the_end_of_all(victim: Server, tmp_path: Path, name: str) -> None:
    program = write_raw(tmp_path, "dynasty.py", DYNASTY)
    with victim.client() as client:
        run = started(client, program, "0")
        family = processes(client)
        victim.kill(name)
        result = run.result(DEADLINE)
        assert result.code == 125 and result.reason is not None
        assert result.reason.code == f"{name}_lost"
        assert all_gone(family)
        again = started(client, program, "0")  # on the new one
        again.cancel()
        reason = again.result(DEADLINE).reason
        assert reason is not None and reason.code == "cancelled"


def test_a_sigkilled_parent(client: Client, tmp_path: Path) -> None:
    run = started(client, write_raw(tmp_path, "dynasty.py", DYNASTY), "0")
    family = processes(client)
    os.kill(run.pid, signal.SIGKILL)
    assert run.result(DEADLINE).code == 128 + signal.SIGKILL
    assert all_gone(family)
