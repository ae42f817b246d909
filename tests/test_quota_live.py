"""Quotas that the operator changes while an inferlet runs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from piehost.host.client import Client, Run
from piehost.host.errors import HostError

from .host_harness import DEADLINE, Server, eventually
from .raw_inferlet import write_raw

# Says what is left of its quotas each time it is sent something.
LEFT = """
    import json

    while True:
        try:
            ask(RECEIVE)
        except Failed:
            sys.exit(0)
        say(json.dumps(ask(QUOTA)))
"""
SPIN = """
    say("spins")
    while True:
        pass
"""


def launch(client: Client, program: Path, *args: str, **quotas: str) -> Run:
    """A run that has started."""
    run = client.launch(program, args, quotas)
    assert eventually(lambda: bool(client.pump(0.01) or run.id))
    return run


def child_of(client: Client, run: Run) -> str:
    """The id of what `run` spawned, once that runs."""
    found: list[str] = []

    def look() -> bool:
        found[:] = [i.id for i in client.inferlets() if i.parent == run.id and i.state == "running"]
        return bool(found)

    assert eventually(look)
    return found[0]


def teller(
    client: Client, tmp_path: Path, **quotas: str
) -> tuple[Run, Callable[[], dict[str, float]]]:
    """A running inferlet, and what asks it for what is left of its quotas."""
    run = launch(client, write_raw(tmp_path, "left.py", LEFT), **quotas)

    def left() -> dict[str, float]:
        run.send(b"?")
        while True:
            client.pump()
            for event in run.take():
                if hasattr(event, "data"):
                    return dict(json.loads(event.data))

    return run, left


def test_what_it_may_hold(client: Client, tmp_path: Path) -> None:
    run, left = teller(client, tmp_path)
    assert left()["kv_pages"] != 17
    asked = {"kv_pages": "17", "embeds": "5", "subscriptions": "3", "children": "2"}
    done = client.set_quota(run.id, asked | {"egress_bytes": "5k", "store_bytes": "1MiB"})
    assert done.before["embeds"] == 1024 and done.after["egress_bytes"] == 5000
    now = left()
    assert {key: now[key] for key in asked} == {key: float(asked[key]) for key in asked}
    assert now["egress_bytes"] == 5000 and now["store_bytes"] <= 1 << 20
    client.set_quota(run.id, {"kv_pages": "18"})
    assert left()["kv_pages"] == 18 and left()["embeds"] == 5


def test_a_call_beyond_a_lowered_quota_fails(client: Client, tmp_path: Path) -> None:
    """What it holds stays."""
    source = """
        for child in (1, 2, 3):
            try:
                ask(SPAWN, child, "", ["child"]) if len(sys.argv) == 1 else ask(RECEIVE)
            except Failed as error:
                say(error.code)
                sys.exit(0)
            say("one more")
            ask(RECEIVE)
    """
    run = launch(client, write_raw(tmp_path, "spawner.py", source))
    child_of(client, run)
    client.set_quota(run.id, {"children": "1"})
    run.send(b"go on")
    result = run.result(DEADLINE)
    assert [m.decode() for m in result.messages] == ["one more", "7"]  # over_quota


def test_the_limits_of_its_process(client: Client, tmp_path: Path) -> None:
    run, _ = teller(client, tmp_path)
    asked = {"fds": "40", "file_size": "1k", "address_space": "3GiB", "cpu_seconds": "77"}
    client.set_quota(run.id, asked)
    assert process_limits(run) == {
        "open files": "40 40",
        "file size": "1000 1000",
        "address space": f"{3 << 30} {3 << 30}",
        "cpu time": "77 77",
    }
    more = {"file_size": "10", "fds": "90", "cpu_seconds": "none"}
    if may_raise():
        client.set_quota(run.id, more)
        now = process_limits(run)
        assert (now["open files"], now["cpu time"]) == ("90 90", "unlimited unlimited")
    else:
        with pytest.raises(HostError, match="cannot be changed") as refused:
            client.set_quota(run.id, more)
        assert "CAP_SYS_RESOURCE" in refused.value.reason.why
        assert process_limits(run)["file size"] == "1000 1000", "all or nothing"


def process_limits(run: Run) -> dict[str, str]:
    """Soft and hard limit of its process, by the kernel's name."""
    text = Path(f"/proc/{run.pid}/limits").read_text()
    names = ("open files", "file size", "address space", "cpu time")
    found = re.findall(rf"^Max ({'|'.join(names)}) +(\w+) +(\w+)", text, re.MULTILINE)
    return {name: f"{soft} {hard}" for name, soft, hard in found}


def may_raise() -> bool:
    """Whether this process has CAP_SYS_RESOURCE, as a child of it has."""
    status = Path("/proc/self/status").read_text()
    (capabilities,) = [line.split()[1] for line in status.splitlines() if "CapEff" in line]
    return bool(int(capabilities, 16) >> 24 & 1)


@pytest.mark.parametrize(
    ("asked", "code", "says"),
    [
        ({"fds": "40", "stack": "1MiB"}, "fixed_quota", "stack"),
        ({"fds": "40", "ring_bytes": "2MiB"}, "fixed_quota", "ring_bytes"),
        ({"fds": "40", "nonsense": "1"}, "bad_quota", "nonsense"),
        ({"fds": "40", "kv_pages": "none"}, "bad_quota", "kv_pages"),
        ({"fds": "40", "cpu": "50k"}, "bad_quota", "cpu"),
        ({"fds": "40", "priority": "101"}, "bad_quota", "priority"),
        ({}, "bad_quota", "no quota"),
    ],
)
def test_all_or_nothing(
    client: Client, tmp_path: Path, asked: dict[str, str], code: str, says: str
) -> None:
    run, left = teller(client, tmp_path)
    before = left()
    with pytest.raises(HostError, match=says) as refused:
        client.set_quota(run.id, asked)
    assert refused.value.reason.code == code and refused.value.reason.hint
    assert process_limits(run)["open files"] == "64 64"
    assert left() == before
    details = client.inspect(run.id).details
    assert details is not None and details.quotas["fds"].cap == 64


def test_its_processor_time(client: Client, tmp_path: Path) -> None:
    run = launch(client, write_raw(tmp_path, "spin.py", SPIN))
    client.set_quota(run.id, {"cpu_seconds": "1"})
    result = run.result(DEADLINE)
    assert result.reason is not None and result.reason.code == "cpu_seconds"
    assert "cpu_seconds is 1" in result.reason.why and result.code == 137


def test_somebodys_kill_is_not_its_processor_time(client: Client, tmp_path: Path) -> None:
    run = launch(client, write_raw(tmp_path, "spin.py", SPIN), cpu_seconds="1000")
    os.kill(run.pid, 9)
    reason = run.result(DEADLINE).reason
    assert reason is not None and reason.code == "signal"


def test_what_its_control_group_keeps(client: Client, tmp_path: Path) -> None:
    source = """
        say("ready")
        ask(RECEIVE)
        block = bytearray(24 << 20)
        say("holds")
        ask(RECEIVE)
    """
    run = launch(client, write_raw(tmp_path, "holder.py", source))
    details = client.inspect(run.id).details
    assert details is not None
    asked = {"cpu": "150%", "memory": "512MiB", "threads": "9"}
    if "cgroup" not in details.controls:
        with pytest.raises(HostError, match="cannot be kept"):
            client.set_quota(run.id, asked)
        return
    assert client.set_quota(run.id, asked).after == {"cpu": 150, "memory": 512 << 20, "threads": 9}
    # what it takes before it is in its group is not charged to it
    assert eventually(lambda: charged(client, run, "threads") > 0)
    run.send(b"take it")
    assert eventually(lambda: charged(client, run, "memory") > 24 << 20)
    client.set_quota(run.id, {"memory": "16MiB"})
    reason = run.result(DEADLINE).reason
    assert reason is not None and reason.code == "memory" and "16MiB" in reason.why


def charged(client: Client, run: Run, quota: str) -> float:
    details = client.inspect(run.id).details
    return (details and details.quotas[quota].used) or 0


def test_its_time(client: Client, tmp_path: Path) -> None:
    run, left = teller(client, tmp_path, wall_seconds="1000")
    assert 900 < left()["wall_seconds"] <= 1000
    client.set_quota(run.id, {"wall_seconds": "none"})
    assert "wall_seconds" not in left()
    client.set_quota(run.id, {"wall_seconds": "500"})
    assert 400 < left()["wall_seconds"] <= 500, "from its launch on"
    client.set_quota(run.id, {"wall_seconds": "1"})
    reason = run.result(DEADLINE).reason
    assert reason is not None and reason.code == "wall_seconds"
    assert "wall_seconds is 1" in reason.why


def test_a_child_has_the_deadline_of_its_launch(client: Client, tmp_path: Path) -> None:
    source = """
        if len(sys.argv) == 1:
            ask(SPAWN, 1, "", ["child"])
        say("ready")
        ask(RECEIVE)
    """
    run = launch(client, write_raw(tmp_path, "parent.py", source))
    with pytest.raises(HostError, match="no time of its own") as refused:
        client.set_quota(child_of(client, run), {"wall_seconds": "1"})
    assert run.id in refused.value.reason.hint


def test_children_spawned_later_have_what_was_changed(client: Client, tmp_path: Path) -> None:
    source = """
        if len(sys.argv) > 1:
            say(ask(QUOTA)["embeds"])
            sys.exit(0)
        ask(RECEIVE)
        ask(SPAWN, 1, "", ["child"])
        say(ask(RECEIVE_CHILD, 1).decode())
    """
    run = launch(client, write_raw(tmp_path, "parent.py", source))
    client.set_quota(run.id, {"embeds": "6", "fds": "50"})
    run.send(b"spawn")
    assert run.result(DEADLINE).text == "6.0"


def test_its_output(client: Client, tmp_path: Path) -> None:
    source = """
        for _ in range(2):
            say("next")
            ask(RECEIVE)
            os.write(1, b"x" * 100)
        say("last")
        ask(RECEIVE)
    """
    run = launch(client, write_raw(tmp_path, "writer.py", source), output_bytes="10")
    run.send(b"write")
    assert eventually(lambda: bool(client.pump(0.01) or used(client, run) == 10))
    client.set_quota(run.id, {"output_bytes": "50"})
    for _ in range(2):
        run.send(b"write")
    result = run.result(DEADLINE)
    assert result.stdout.count(b"x") == 50


def used(client: Client, run: Run) -> float | None:
    details = client.inspect(run.id).details
    assert details is not None
    return details.quotas["output_bytes"].used


def test_rates_and_ranks_are_shown(client: Client, tmp_path: Path) -> None:
    run, _ = teller(client, tmp_path)
    asked = {
        "tokens_per_second": "10", "commands_per_second": "20", "share": "500", "priority": "-3",
    }  # fmt: skip
    client.set_quota(run.id, asked)
    details = client.inspect(run.id).details
    assert details is not None
    for key, value in asked.items():
        assert details.quotas[key].cap == int(value) and details.quotas[key].source == "quota set"
    client.set_quota(run.id, {"tokens_per_second": "none"})


def test_the_command_line(server: Server, client: Client, tmp_path: Path) -> None:
    terminal = server.terminal
    run, left = teller(client, tmp_path)
    done = terminal.run("quota", "set", run.id, "kv_pages=128", "output_bytes=2MiB", check=0)
    assert done.stdout == b"kv_pages: 1024 -> 128\noutput_bytes: 1MiB -> 2MiB\n"
    assert left()["kv_pages"] == 128
    done = terminal.run("quota", "set", run.id, "kv_pages=64", "--json", check=0)
    assert json.loads(done.stdout) == {"before": {"kv_pages": 128}, "after": {"kv_pages": 64}}
    shown = json.loads(terminal.run("quota", "show", run.id, "--json", check=0).stdout)
    assert shown["kv_pages"] == {
        "cap": 64, "used": 0.0, "source": "quota set", "live": True, "beyond": "the call fails",
    }  # fmt: skip
    assert shown["stack"]["live"] is False and shown["wall_seconds"]["cap"] is None
    for wrong in ("nonsense=1", "kv_pages", "kv_pages=0", "cpu=1x"):
        done = terminal.run("quota", "set", run.id, wrong, check=2)
        assert wrong.partition("=")[0].encode() in done.stderr and b"try:" in done.stderr
    fixed = terminal.run("quota", "set", run.id, "stack=1MiB", check=126)
    assert b"stays as it is" in fixed.stderr and b"launch it again" in fixed.stderr
    for verb in (("set", "nobody-1", "fds=40"), ("show", "nobody-1")):
        assert b"no inferlet nobody-1" in terminal.run("quota", *verb, check=127).stderr
    run.close_input()
    run.result(DEADLINE)
    assert b"no inferlet" in terminal.run("quota", "set", run.id, "fds=40", check=127).stderr
    assert b"has ended" in terminal.run("quota", "show", run.id, check=127).stderr
