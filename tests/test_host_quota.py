"""Quotas and what inferlets learn of them: limits, what is left, the end of their time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from piehost.host.client import Client
from piehost.host.errors import HostError

from .host_harness import DEADLINE, SCRIPTED, Server, all_gone, new_terminal, processes, started
from .raw_inferlet import DYNASTY, write_raw

SHOW = """
    import json

    say(json.dumps({
        **{key: startup[key] for key in ("user", "job", "id", "deadline", "version", "limits")},
        "rings": [os.lseek(fd, 0, os.SEEK_END) for fd in (4, 5)],
        "left": ask(QUOTA),
    }))
"""


def shown(client: Client, tmp_path: Path, **launch: Any) -> dict[str, Any]:
    result = client.launch(write_raw(tmp_path, "show.py", SHOW), **launch).result(DEADLINE)
    assert result.code == 0, result
    block = json.loads(result.text)
    assert isinstance(block, dict)
    return block


def test_what_an_inferlet_finds_by_default(client: Client, tmp_path: Path) -> None:
    block = shown(client, tmp_path)
    limits = block["limits"]
    assert block["user"] and block["version"] and block["deadline"] is None
    assert block["job"] == block["id"]
    assert {
        key: limits[key]
        for key in ("history", "children", "subscriptions", "http_streams", "store_bytes")
    } == {
        "history": 65536,
        "children": 8,
        "subscriptions": 64,
        "http_streams": 8,
        "store_bytes": 64 << 20,
    }
    assert limits["export_pages"] == min(1024, client.models().pages // 2)
    assert block["rings"] == [limits["ring_bytes"], limits["ring_in_bytes"]] == [1 << 20, 1 << 20]
    left = block["left"]
    assert "wall_seconds" not in left and "cpu_seconds" not in left
    for key in ("kv_pages", "children", "subscriptions", "http_streams", "history"):
        assert left[key] == limits[key], key
    assert left["egress_bytes"] == 64 << 20
    assert 0 <= left["store_bytes"] <= limits["store_bytes"]


def test_what_a_launch_asks_for(client: Client, tmp_path: Path) -> None:
    quotas = {
        "children": "3",
        "store_bytes": "1MiB",
        "ring_in_bytes": "3MiB",
        "wall_seconds": "1000",
        "cpu_seconds": "100",
        "egress_bytes": "5k",
    }
    before = time.time()
    block = shown(client, tmp_path, quotas=quotas, user="ada", job="engine")
    assert (block["user"], block["job"]) == ("ada", "engine")
    assert before + 1000 <= block["deadline"] <= time.time() + 1000
    assert block["limits"]["children"] == 3 and block["limits"]["store_bytes"] == 1 << 20
    assert block["rings"] == [1 << 20, 3 << 20]
    left = block["left"]
    assert left["egress_bytes"] == 5000 and left["store_bytes"] <= 1 << 20
    assert 0 < left["wall_seconds"] <= 1000 and 0 < left["cpu_seconds"] <= 100


def test_rings_of_any_size_beside_each_other(client: Client, tmp_path: Path) -> None:
    """Larger ones than the pool's are made; one of the two may be the larger one."""
    sizes = [(1, 2), (4, 1), (1, 1), (2, 3), (1, 1)]
    program = write_raw(tmp_path, "show.py", SHOW)
    runs = [
        client.launch(program, [], {"ring_bytes": f"{out}MiB", "ring_in_bytes": f"{into}MiB"})
        for out, into in sizes
    ]
    results = [run.result(DEADLINE) for run in runs]
    blocks = [json.loads(result.text) for result in results]
    assert [block["limits"]["ring_in_bytes"] >> 20 for block in blocks] == [s[1] for s in sizes]
    for block, (out, into) in zip(blocks, sizes, strict=True):
        assert block["rings"][0] >= out << 20 and block["rings"][1] >= into << 20


def test_what_is_left_goes_down(client: Client, tmp_path: Path) -> None:
    source = """
        if len(sys.argv) > 1:
            ask(RECEIVE)
            sys.exit(0)
        full = ask(QUOTA)
        ask(SPAWN, 1, "", ["child"])
        ask(STORE_SET, "key", b"x" * 1000)
        less = ask(QUOTA)
        say(full["children"] - less["children"])
        say(full["store_bytes"] - less["store_bytes"])
        ask(END_CHILD, 1)
        ask(STORE_DELETE, "key")
        while ask(QUOTA)["children"] < full["children"]:
            time.sleep(0.01)
        say(ask(QUOTA)["store_bytes"] == full["store_bytes"])
    """
    run = client.launch(write_raw(tmp_path, "left.py", source), user="left")
    assert [m.decode() for m in run.result(DEADLINE).messages] == ["1", "1003", "True"]


def test_the_processor_time_left_goes_down(client: Client, tmp_path: Path) -> None:
    source = """
        first = ask(QUOTA)["cpu_seconds"]
        until = time.process_time() + 0.1
        while time.process_time() < until:
            pass
        say(first - ask(QUOTA)["cpu_seconds"] >= 0.05)
    """
    run = client.launch(write_raw(tmp_path, "spin.py", source), [], {"cpu_seconds": "50"})
    assert run.result(DEADLINE).text == "True"


def test_the_end_of_its_time(client: Client, tmp_path: Path) -> None:
    """Its descendants have no more; and they are all gone when the client hears of it."""
    program = write_raw(tmp_path, "dynasty.py", DYNASTY)
    run = started(client, program, "0", wall_seconds="2")
    family = processes(client)
    assert len(family) == 3
    result = run.result(DEADLINE)
    assert result.reason is not None and result.reason.code == "wall_seconds"
    assert "wall_seconds is 2" in result.reason.why and result.reason.hint
    assert result.code == 137 and all_gone(family)


def test_children_have_their_parents_deadline(client: Client, tmp_path: Path) -> None:
    source = """
        if len(sys.argv) > 1:
            say(startup["deadline"])
            sys.exit(0)
        ask(SPAWN, 1, "", ["child"])
        say(ask(RECEIVE_CHILD, 1).decode() == str(startup["deadline"]))
    """
    run = client.launch(write_raw(tmp_path, "deadline.py", source), [], {"wall_seconds": "100"})
    assert run.result(DEADLINE).text == "True"


@pytest.mark.parametrize(
    ("launch", "says"),
    [
        ({"user": "a\nb"}, "--user"),
        ({"job": "x" * 300}, "--job"),
        ({"egress": ["no place"]}, "no grant"),
        ({"egress": ["http://example.com"]}, "no grant"),
        ({"egress": ["example.com:0"]}, "no grant"),
        ({"egress": ["10.0.0.1/8"]}, "no grant"),
        ({"quotas": {"children": "-1"}}, "children"),
        ({"quotas": {"wall_seconds": "0"}}, "wall_seconds"),
        ({"quotas": {"ring_in_bytes": "1"}}, "ring_in_bytes"),
    ],
)
def test_what_no_launch_can_ask_for(
    client: Client, tmp_path: Path, launch: dict[str, Any], says: str
) -> None:
    """The host checks too: its clients need not be our command line."""
    run = client.launch(write_raw(tmp_path, "show.py", SHOW), **launch)
    with pytest.raises(HostError, match=says) as refused:
        run.result(DEADLINE)
    assert refused.value.reason.hint


def test_the_command_line_refuses_the_same(server: Server, tmp_path: Path) -> None:
    path = write_raw(tmp_path, "show.py", SHOW)
    done = server.terminal.run("launch", "--egress", "a b", path, check=126)
    assert b"is no grant" in done.stderr and b"try:" in done.stderr
    done = server.terminal.run("serve", "--egress", "a b", check=126)
    assert b"is no grant" in done.stderr
    done = server.terminal.run("launch", "--user", "a\nb", path, check=126)
    assert b"--user" in done.stderr
    done = server.terminal.run("launch", "--user", "ada", "--job", "engine", path, check=0)
    assert (json.loads(done.stdout)["user"], json.loads(done.stdout)["job"]) == ("ada", "engine")


def test_what_the_operator_allows_is_the_most(tmp_path: Path) -> None:
    path = write_raw(tmp_path, "show.py", SHOW)
    ceiling = ("--egress", "*.example.com", "--egress", "10.1.0.0/16:8080", "--egress", "0.0.0.0/0")
    with (
        new_terminal() as terminal,
        terminal.server(*SCRIPTED, "--quota", "children=2", *ceiling) as server,
        server.client() as client,
    ):
        assert shown(client, tmp_path)["limits"]["children"] == 2
        within = ["a.example.com", "*.b.example.com:443", "10.1.2.3:8080", "10.1.2.0/24:8080"]
        for grant in (*within, "93.184.216.34"):
            shown(client, tmp_path, egress=[grant])
        outside = ["example.com", "a.example.org", "a.example.com:8080", "10.2.0.1:8080"]
        for grant in (*outside, "10.1.2.3", "10.0.0.0/8:8080", "127.0.0.1", "[::1]:8080"):
            with pytest.raises(HostError, match="lets no inferlet reach"):
                client.launch(path, egress=["a.example.com", grant]).result(DEADLINE)
        with pytest.raises(HostError, match="ceiling"):
            client.launch(path, [], {"children": "3"}).result(DEADLINE)
