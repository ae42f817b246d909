"""The store and the egress broker behind a real host: what they keep, and what becomes of calls
when one of them dies."""

from __future__ import annotations

import contextlib
import http.server
import os
import pwd
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from piehost.host.client import Client, Run
from piehost.host.services import store_path

from .host_harness import (
    DEADLINE,
    SCRIPTED,
    Server,
    Terminal,
    debugged,
    eventually,
    new_terminal,
)
from .raw_inferlet import write_raw

OVER_QUOTA, DENIED, UNAVAILABLE = 7, 15, 17

# does what its arguments say, one after the other, and says how that went
STORE = """
    for word in sys.argv[1:]:
        verb, _, rest = word.partition(":")
        key, _, value = rest.partition("=")
        try:
            if verb == "set":
                say(ask(STORE_SET, key, value.encode()))
            elif verb == "get":
                found = ask(STORE_GET, key)
                say(None if found is None else found.decode())
            elif verb == "list":
                say(",".join(ask(STORE_LIST)))
        except Failed as error:
            say(error.code)
"""
FETCH = """
    url, *more = sys.argv[1:]
    try:
        status, headers = ask(HTTP_GET, 1, url)
        body = b""
        while part := ask(HTTP_READ, 1):
            body += part
        say(f"{status} {len(body)}")
    except Failed as error:
        say(error.code)
"""


class Site(http.server.BaseHTTPRequestHandler):
    """`/N` has a body of N octets."""

    def do_GET(self) -> None:
        size = int(self.path[1:])
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.write(b"x" * size)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """No log."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """127.0.0.1:PORT, where a web server is."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"127.0.0.1:{web.server_address[1]}"
        web.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def victim() -> Iterator[Server]:
    """A server that gets hurt."""
    with new_terminal() as terminal, terminal.server(*SCRIPTED) as running:
        yield running


def said(run: Run) -> list[str]:
    result = run.result(DEADLINE)
    assert result.code == 0, result
    return [message.decode() for message in result.messages]


def store(client: Client, tmp_path: Path, *words: str, user: str = "ada") -> list[str]:
    return said(client.launch(write_raw(tmp_path, "store.py", STORE), words, user=user))


# --- the store -----------------------------------------------------------------------------------


def test_the_store_outlives_its_server_and_keeps_users_apart(
    terminal: Terminal, tmp_path: Path
) -> None:
    with terminal.server(*SCRIPTED) as server, server.client() as client:
        assert "store" not in client.stats().children, "it starts with the first call"
        assert store(client, tmp_path, "get:k", "set:k=old", "set:k=new") == ["None"] * 3
        assert client.stats().children["store"]
        assert store(client, tmp_path, "get:k", "set:other=1", user="eve") == ["None", "None"]
        file = terminal.directory / "store.sqlite3"
        assert file.stat().st_mode & 0o077 == 0
    with terminal.server(*SCRIPTED) as server, server.client() as client:
        assert store(client, tmp_path, "get:k", "list:") == ["new", "k"]
        assert store(client, tmp_path, "get:k", "list:", user="eve") == ["None", "other"]


def test_two_servers_share_the_store(terminal: Terminal, tmp_path: Path) -> None:
    with new_terminal() as second:
        second.environment["PIEHOST_STORE"] = terminal.environment["PIEHOST_STORE"]
        with (
            terminal.server(*SCRIPTED) as here,
            second.server(*SCRIPTED) as there,
            here.client() as one,
            there.client() as other,
        ):
            assert store(one, tmp_path, "set:k=one") == ["None"]
            assert store(other, tmp_path, "get:k", "set:k=two") == ["one", "None"]
            assert store(one, tmp_path, "get:k") == ["two"]


def test_children_see_their_parents_store(client: Client, tmp_path: Path) -> None:
    source = """
        if len(sys.argv) > 1:
            ask(STORE_SET, "from", b"child")
            sys.exit(0)
        ask(SPAWN, 1, "", ["child"])
        ask(WAIT_CHILD, 1)
        say(ask(STORE_GET, "from").decode())
    """
    run = client.launch(write_raw(tmp_path, "parent.py", source), user="parent")
    assert said(run) == ["child"]


def test_what_was_set_last_counts_though_nobody_waited(client: Client, tmp_path: Path) -> None:
    program = write_raw(tmp_path, "hasty.py", 'post(STORE_SET, "k", sys.argv[1].encode())')
    for turn in ("one", "two", "three"):
        assert said(client.launch(program, [turn], user="hasty")) == []
        assert store(client, tmp_path, "get:k", user="hasty") == [turn]


def test_a_store_that_cannot_be(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    terminal.environment["PIEHOST_STORE"] = str(tmp_path / "file" / "store.sqlite3")
    source = """
        try:
            ask(STORE_GET, "k")
        except Failed as error:
            say(error)
    """
    with terminal.server(*SCRIPTED) as server, server.client() as client:
        (text,) = said(client.launch(write_raw(tmp_path, "why.py", source)))
    assert text.startswith(f"{UNAVAILABLE}: ") and str(tmp_path) not in text


def test_without_a_place_of_its_own_the_store_is_in_the_users_state(
    terminal: Terminal, tmp_path: Path
) -> None:
    del terminal.environment["PIEHOST_STORE"]
    terminal.environment["XDG_STATE_HOME"] = str(terminal.directory / "state")
    with terminal.server(*SCRIPTED) as server, server.client() as client:
        assert store(client, tmp_path, "set:k=1") == ["None"]
    folder = terminal.directory / "state" / "piehost"
    assert folder.stat().st_mode & 0o077 == 0 and (folder / "store.sqlite3").is_file()


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with a bare user id. `Service` answers inferlets with an OSError's text."""

    def nobody(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    for name in ("PIEHOST_STORE", "XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(OSError, match="PIEHOST_STORE"):
        store_path()


# --- when a service dies -------------------------------------------------------------------------


def test_a_killed_store_answers_what_waits_and_works_again(victim: Server, tmp_path: Path) -> None:
    source = """
        ask(STORE_SET, "k", b"kept")
        say("ready")
        ask(RECEIVE)
        waiting = [post(STORE_GET, "k"), post(STORE_SET, "k", b"lost"), post(QUOTA)]
        say("asked")
        for request in waiting:
            try:
                say(" ".join(take(request)))
            except Failed as error:
                say(error.code)
        say(ask(STORE_GET, "k").decode())
        say(" ".join(ask(QUOTA)))
    """
    with victim.client() as client, contextlib.ExitStack() as stack:
        run = client.launch(write_raw(tmp_path, "asks.py", source), user="killed")
        heard: list[str] = []
        for event in run.events():
            if (data := getattr(event, "data", None)) is None:
                continue
            heard.append(data.decode())
            if heard[-1] == "ready":
                process = psutil.Process(client.stats().children["store"])
                stack.enter_context(debugged(process.pid))
                run.send(b"go on")
            elif heard[-1] == "asked":
                process.kill()
        assert heard[:4] == ["ready", "asked", *[str(UNAVAILABLE)] * 2]
        without, kept, whole = heard[4:]
        assert kept == "kept"
        assert {*whole.split()} - {*without.split()} == {"store_bytes"}, "that alone is not known"
        assert {*without.split()} < {*whole.split()}
        assert client.stats().children["store"] != process.pid


def test_a_service_that_keeps_dying_is_not_started_for_ever(victim: Server, tmp_path: Path) -> None:
    with victim.client() as client:
        pids = set()
        for _ in range(10):
            store(client, tmp_path, "get:k")
            children = client.stats().children
            if "store" not in children:
                break
            pids.add(children["store"])
            victim.kill("store")
            assert eventually(lambda pid=children["store"]: not psutil.pid_exists(pid))
        assert 1 <= len(pids) <= 5
        assert store(client, tmp_path, "get:k", "set:k=1") == [str(UNAVAILABLE)] * 2
        # others go on
        fetch = write_raw(tmp_path, "fetch.py", FETCH)
        assert said(client.launch(fetch, ["http://127.0.0.1/"])) == [str(DENIED)]


def test_no_service_outlives_its_host(terminal: Terminal, tmp_path: Path) -> None:
    fetch = write_raw(tmp_path, "fetch.py", FETCH)
    with terminal.server(*SCRIPTED) as server:
        with server.client() as client:
            store(client, tmp_path, "get:k")
            said(client.launch(fetch, ["http://127.0.0.1/"]))
            children = client.stats().children
        services = [psutil.Process(children[name]) for name in ("store", "egress")]
        os.kill(server.process.pid, signal.SIGKILL)
        assert eventually(lambda: not any(p.is_running() for p in services))


# --- egress --------------------------------------------------------------------------------------


def test_egress_goes_where_the_launch_grants_it(client: Client, tmp_path: Path, site: str) -> None:
    fetch = write_raw(tmp_path, "fetch.py", FETCH)
    url = f"http://{site}/200000"
    assert said(client.launch(fetch, [url])) == [str(DENIED)]
    assert said(client.launch(fetch, [url], egress=["127.0.0.1"])) == [str(DENIED)]  # port 80
    assert said(client.launch(fetch, [url], egress=["example.com", site])) == ["200 200000"]
    assert said(client.launch(fetch, [url])) == [str(DENIED)]


def test_egress_from_the_command_line(server: Server, tmp_path: Path, site: str) -> None:
    fetch = write_raw(tmp_path, "fetch.py", FETCH)
    url = f"http://{site}/10"
    done = server.terminal.run("launch", "--egress", site, fetch, "--", url, check=0)
    assert done.stdout == b"200 10\n"


def test_the_egress_quota_is_the_familys(client: Client, tmp_path: Path, site: str) -> None:
    """Otherwise a program could have as much as it likes by spawning children."""
    source = """
        def fetch(size):
            try:
                ask(HTTP_GET, 1, f"{sys.argv[1]}/{size}")
                while ask(HTTP_READ, 1):
                    pass
                ask(HTTP_CLOSE, 1)
            except Failed as error:
                return error.code
            return 0

        if len(sys.argv) > 2:
            sys.exit(fetch(40000))
        codes = [fetch(100)]
        for child in range(1, 5):
            ask(SPAWN, child, "", [sys.argv[1], "child"])
            codes.append(ask(WAIT_CHILD, child))
        codes.append(fetch(40000))
        say(codes)
        say(ask(QUOTA)["egress_bytes"])
    """
    program = write_raw(tmp_path, "family.py", source)
    run = client.launch(program, [f"http://{site}"], {"egress_bytes": "100000"}, egress=[site])
    codes, left = said(run)
    assert codes == str([0, 0, 0, OVER_QUOTA, OVER_QUOTA, OVER_QUOTA])
    assert left == "0"


def test_what_a_child_used_counts_though_it_died_at_once(
    victim: Server, tmp_path: Path, site: str
) -> None:
    """The broker says so when the host knows already that the child is gone."""
    source = """
        url = f"http://{sys.argv[1]}/0"
        if len(sys.argv) > 2:
            post(HTTP_POST, 1, url, b"", {}, True)
            post(HTTP_WRITE, 1, bytes(30000), True)
            sys.exit(0)
        ask(HTTP_GET, 1, url)
        say("ready")
        ask(RECEIVE)
        ask(SPAWN, 1, "", [sys.argv[1], "child"])
        ask(WAIT_CHILD, 1)
        say("dead")
        while ask(QUOTA)["egress_bytes"] != 100000 - 30000:
            time.sleep(0.01)
    """
    program = write_raw(tmp_path, "brief.py", source)
    with victim.client() as client, contextlib.ExitStack() as until_dead:
        run = client.launch(program, [site], {"egress_bytes": "100000"}, egress=[site])
        for event in run.events():
            match getattr(event, "data", None):
                case b"ready":
                    until_dead.enter_context(debugged(client.stats().children["egress"]))
                    run.send(b"go on")
                case b"dead":
                    until_dead.close()
                    break
        assert run.result(DEADLINE).code == 0


def test_a_killed_broker_works_again(victim: Server, tmp_path: Path, site: str) -> None:
    fetch = write_raw(tmp_path, "fetch.py", FETCH)
    with victim.client() as client:
        for _ in range(2):
            run = client.launch(fetch, [f"http://{site}/5"], egress=[site])
            assert said(run) == ["200 5"]
            victim.kill("egress")
