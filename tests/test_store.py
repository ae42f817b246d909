"""The store's process: what it keeps, refuses, and survives. Real processes on real files."""

from __future__ import annotations

import random
import resource
import signal
import sqlite3
import stat
from pathlib import Path

import pytest
from inferlet.abi import MAX_FRAME_BYTES, MAX_LISTED, encoder
from inferlet.errors import InferletError, QuotaError, UnavailableError

from piehost.wire.services import (
    HttpRead,
    StoreCall,
    StoreDelete,
    StoreExists,
    StoreGet,
    StoreList,
    StoreSet,
    StoreUsed,
)

from .service_harness import Service


def store(path: Path, **options: object) -> Service:
    return Service("piehost.host.store", "--path", str(path), **options)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "store.sqlite3"


def check_file(path: Path) -> None:
    """The file is whole, and its totals are those of its entries."""
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    counted = "SELECT user, sum(length(key) + length(value)) FROM entries GROUP BY user"
    stated = "SELECT user, octets FROM totals WHERE octets > 0"
    assert dict(connection.execute(counted)) == dict(connection.execute(stated))
    connection.close()


# --- the calls --------------------------------------------------------------------------------


def test_set_get_exists_delete(path: Path) -> None:
    with store(path) as service:
        service.grant()
        assert service.ask(StoreGet("k")) is None
        assert service.ask(StoreExists("k")) is False
        assert service.ask(StoreSet("k", b"\x00\xff")) is None
        assert service.ask(StoreGet("k")) == b"\x00\xff"
        assert service.ask(StoreExists("k")) is True
        service.ask(StoreSet("k", b""))
        assert service.ask(StoreGet("k")) == b""
        assert service.ask(StoreDelete("k")) is True
        assert service.ask(StoreDelete("k")) is False
        assert service.ask(StoreGet("k")) is None


def test_values_stay_across_restarts_and_the_file_is_private(path: Path) -> None:
    with store(path) as service:
        service.grant()
        service.ask(StoreSet("k", b"kept"))
        for file in path.parent.iterdir():  # also the write-ahead log
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    with store(path) as service:
        service.grant()
        assert service.ask(StoreGet("k")) == b"kept"
    check_file(path)


def test_users_see_their_own_entries_only(path: Path) -> None:
    with store(path) as service:
        service.grant(1, user="a")
        service.grant(2, user="b")
        service.grant(3, user="a")
        service.ask(StoreSet("k", b"of a"), 1)
        assert service.ask(StoreGet("k"), 2) is None
        assert service.ask(StoreList("", ""), 2) == []
        assert service.ask(StoreDelete("k"), 2) is False
        assert service.ask(StoreUsed(), 2) == 0
        assert service.ask(StoreGet("k"), 3) == b"of a"


def test_list_goes_by_octets_with_prefix_and_after(path: Path) -> None:
    keys = ["a", "a\x00", "aa", "ab", "b", "é", "a%", "A", "a_", "\U0001f600", "\uffff"]
    ordered = sorted(keys, key=str.encode)
    with store(path) as service:
        service.grant()
        for key in keys:
            service.ask(StoreSet(key, b""))
        assert service.ask(StoreList("", "")) == ordered
        assert service.ask(StoreList("a", "")) == [k for k in ordered if k.startswith("a")]
        for after in [*keys, "0", "zzz"]:
            expected = [k for k in ordered if k.encode() > after.encode()]
            assert service.ask(StoreList("", after)) == expected
            begin = [k for k in expected if k.startswith("a")]
            assert service.ask(StoreList("a", after)) == begin
        assert service.ask(StoreList("nothing", "")) == []


@pytest.mark.parametrize("length", [4, 256])
def test_a_list_fits_one_frame_and_continues_after_its_last(path: Path, length: int) -> None:
    keys = [f"{i:04d}".ljust(length, "x") for i in range(600)]
    with store(path) as service:
        service.grant()
        for request in [service.send(StoreSet(key, b"")) for key in keys]:
            service.wait(request)
        seen: list[str] = []
        while part := service.ask(StoreList("", seen[-1] if seen else "")):
            assert len(part) <= MAX_LISTED
            assert len(encoder.encode([[0, 0xFFFFFFFF, part]])) <= MAX_FRAME_BYTES
            seen += part
        assert seen == keys


# --- the quota --------------------------------------------------------------------------------


def test_a_set_beyond_the_quota_changes_nothing(path: Path) -> None:
    with store(path) as service:
        service.grant(store_bytes=100)
        service.ask(StoreSet("k" * 10, b"v" * 90))
        assert service.ask(StoreUsed()) == 100
        for call in [StoreSet("k" * 10, b"v" * 91), StoreSet("l", b"")]:
            with pytest.raises(QuotaError, match="of 100"):
                service.ask(call)
        assert service.ask(StoreGet("k" * 10)) == b"v" * 90
        assert service.ask(StoreUsed()) == 100
        service.ask(StoreSet("k" * 10, b"w"))
        assert service.ask(StoreUsed()) == 11
        service.ask(StoreDelete("k" * 10))
        assert service.ask(StoreUsed()) == 0
        service.ask(StoreSet("l" * 50, b"v" * 50))


def test_a_failing_set_undoes_none_of_its_neighbours(path: Path) -> None:
    """Asks that arrive together share a transaction; each is atomic all the same."""
    with store(path) as service:
        service.grant(1, store_bytes=1000)
        service.grant(2, store_bytes=3)
        asked = [
            (service.send(StoreSet(f"k{i}", bytes(4)), 1 + i % 2), i % 2 == 1) for i in range(60)
        ]
        for request, refused in asked:
            if refused:
                with pytest.raises(QuotaError):
                    service.wait(request)
            else:
                service.wait(request)
        assert len(service.ask(StoreList("", ""))) == 30
    check_file(path)


@pytest.mark.parametrize("seed", range(4))
def test_random_calls_agree_with_a_dictionary(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    quota = 300
    users: dict[int, dict[str, bytes]] = {1: {}, 2: {}}

    def expected(seat: int, call: object) -> object:
        held = users[seat]
        match call:
            case StoreSet(key, value):
                changed = {**held, key: value}
                if sum(len(k.encode()) + len(v) for k, v in changed.items()) > quota:
                    return QuotaError
                users[seat] = changed
                return None
            case StoreGet(key):
                return held.get(key)
            case StoreExists(key):
                return key in held
            case StoreDelete(key):
                return held.pop(key, None) is not None
            case StoreList(prefix, after):
                return sorted(
                    (k for k in held if k.startswith(prefix) and k.encode() > after.encode()),
                    key=str.encode,
                )
        return sum(len(k.encode()) + len(v) for k, v in held.items())

    with store(path) as service:
        for seat in users:
            service.grant(seat, user=f"user {seat}", store_bytes=quota)
        for _ in range(30):
            asked = []
            for _ in range(rng.randint(1, 20)):
                key = "".join(rng.choices("abé", k=rng.randint(1, 3)))
                calls: list[StoreCall] = [
                    StoreSet(key, rng.randbytes(rng.randint(0, 80))),
                    StoreSet(key, b""),
                    StoreGet(key),
                    StoreExists(key),
                    StoreDelete(key),
                    StoreList(rng.choice(["", key[0]]), rng.choice(["", key])),
                    StoreUsed(),
                ]
                seat, call = rng.choice([1, 2]), rng.choice(calls)
                asked.append((service.send(call, seat), call, expected(seat, call)))
            for request, call, answer in asked:
                if answer is QuotaError:
                    with pytest.raises(QuotaError):
                        service.wait(request)
                else:
                    assert service.wait(request) == answer, call
    check_file(path)


# --- crashes and neighbours -------------------------------------------------------------------


@pytest.mark.parametrize("answers", [1, 40, 150])
def test_every_answered_set_survives_a_kill(path: Path, answers: int) -> None:
    service = store(path)
    service.grant(store_bytes=1 << 24)
    sent = {service.send(StoreSet(f"k{i}", b"%d" % i * 500)): i for i in range(400)}
    while len(service.order) < answers:
        service.receive(30)
    service.kill()
    kept = [sent[request] for request in service.order]
    service.close()
    with store(path) as again:
        again.grant(store_bytes=1 << 24)
        for i in kept:
            assert again.ask(StoreGet(f"k{i}")) == b"%d" % i * 500
        again.ask(StoreSet("and it", b"goes on"))
    check_file(path)


def test_two_stores_share_a_file_and_one_quota(path: Path) -> None:
    with store(path) as one, store(path) as two:
        asked = []
        for service in (one, two):
            service.grant(store_bytes=300 * 104)
        for i in range(200):
            asked.append((one, one.send(StoreSet(f"1{i:03d}", bytes(100)))))
            asked.append((two, two.send(StoreSet(f"2{i:03d}", bytes(100)))))
        refused = 0
        for service, request in asked:
            try:
                service.wait(request)
            except QuotaError:
                refused += 1
        assert refused == 100
        assert one.ask(StoreUsed()) == two.ask(StoreUsed()) == 300 * 104
        two.ask(StoreSet("1000", b"seen by the other"))
        assert one.ask(StoreGet("1000")) == b"seen by the other"
        one.kill()
        two.ask(StoreSet("1000", b"goes on"))
    check_file(path)


def test_a_lock_held_by_another_process_is_unavailable_and_passes(path: Path) -> None:
    with store(path) as service:
        service.grant()
        service.ask(StoreSet("k", b"before"))
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        writes = [service.send(StoreSet("k", b"no")) for _ in range(5)]
        read = service.send(StoreGet("k"))
        for request in writes:
            with pytest.raises(UnavailableError, match="locked by another process"):
                service.wait(request)
        assert service.wait(read) == b"before"
        other.execute("ROLLBACK")
        other.close()
        service.ask(StoreSet("k", b"after"))


def test_a_set_waits_for_the_transaction_of_another_store(path: Path) -> None:
    """It counts what the other one wrote meanwhile."""
    with store(path) as service:
        service.grant(store_bytes=100)
        service.ask(StoreSet("k", bytes(49)))
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        other.execute("INSERT INTO entries VALUES ('someone', ?, ?)", (b"o", bytes(39)))
        other.execute("UPDATE totals SET octets = octets + 40")
        waiting = service.send(StoreSet("fits", bytes(6)))
        assert not service.receive(1.0)
        other.execute("COMMIT")
        other.close()
        service.wait(waiting)
        with pytest.raises(QuotaError):
            service.ask(StoreSet("m", b""))
    check_file(path)


# --- a file that is not as it should be -------------------------------------------------------


def refuses_everything(service: Service, why: str) -> None:
    service.grant()
    calls: list[StoreCall] = [StoreGet("k"), StoreSet("k", b"v"), StoreDelete("k")]
    for call in [*calls, StoreExists("k"), StoreUsed(), StoreList("", "")]:
        with pytest.raises(UnavailableError, match=why) as caught:
            service.ask(call)
        assert caught.value.hint
        assert "/" not in str(caught.value), "where the file is is none of the inferlet's business"


def test_a_file_that_is_no_database(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"this is not a database, but it is somebody's " * 100)
    before = path.read_bytes()
    with store(path) as service:
        refuses_everything(service, "cannot use its file")
        assert path.read_bytes() == before
        path.rename(path.with_suffix(".old"))  # what the hint says
        service.ask(StoreSet("k", b"v"))
        assert service.ask(StoreGet("k")) == b"v"


def test_the_database_of_another_program(path: Path) -> None:
    path.parent.mkdir()
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE entries (mine TEXT)")
    other.commit()
    other.close()
    with store(path) as service:
        refuses_everything(service, "another program")
    assert sqlite3.connect(path).execute("SELECT count(*) FROM sqlite_schema").fetchone() == (1,)


def test_a_newer_version_of_the_store(path: Path) -> None:
    with store(path) as service:
        service.grant()
        service.ask(StoreSet("k", b"v"))
    newer = sqlite3.connect(path)
    newer.execute("PRAGMA user_version = 2")
    newer.close()
    with store(path) as service:
        refuses_everything(service, "version 2")


def test_a_damaged_file(path: Path) -> None:
    with store(path) as service:
        service.grant()
        for i in range(50):
            service.ask(StoreSet(f"k{i}", bytes(5000)))
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xa5" * (len(whole) - 4096))
    with store(path) as service:
        refuses_everything(service, "cannot use its file")
    assert path.read_bytes()[4096:] == b"\xa5" * (len(whole) - 4096)


def test_a_path_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with store(tmp_path / "file" / "store.sqlite3") as service:
        refuses_everything(service, "cannot use its file")
    (tmp_path / "folder").mkdir()
    with store(tmp_path / "folder") as service:
        refuses_everything(service, "cannot use its file")


def test_a_full_disk_refuses_sets_and_still_answers_gets(path: Path) -> None:
    limit = 1 << 20

    def small_files() -> None:  # past this size, writing fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    with store(path, prepare=small_files) as service:
        service.grant(store_bytes=1 << 30)
        kept: list[int] = []
        with pytest.raises(UnavailableError, match="cannot write"):
            for i in range(100):
                service.ask(StoreSet(f"k{i}", bytes([i]) * 50000))
                kept.append(i)
        assert kept, "some fitted"
        read = [(i, service.send(StoreGet(f"k{i}"))) for i in kept]
        refused = service.send(StoreSet("one more", bytes(50000)))
        read += [(i, service.send(StoreGet(f"k{i}"))) for i in kept]
        with pytest.raises(UnavailableError, match="cannot write"):
            service.wait(refused)
        for i, request in read:
            assert service.wait(request) == bytes([i]) * 50000
    check_file(path)


# --- the link ---------------------------------------------------------------------------------


def test_calls_that_are_not_its_own_and_seats_it_was_not_told_of(path: Path) -> None:
    with store(path) as service:
        with pytest.raises(UnavailableError):
            service.ask(StoreGet("k"))
        service.grant()
        with pytest.raises(InferletError):
            service.ask(HttpRead(1))
        assert service.ask(StoreGet("k")) is None


def test_a_seat_that_is_gone_is_not_answered(path: Path) -> None:
    with store(path) as service:
        service.grant(1)
        service.grant(2)
        service.ask(StoreGet("k"), 2)
        service.process.send_signal(signal.SIGSTOP)  # so that it finds all of these together
        late = service.send(StoreSet("k", b"v"), 1)
        service.gone(1)
        after = service.send(StoreGet("l"), 2)
        service.process.send_signal(signal.SIGCONT)
        assert service.wait(after) is None
        assert not service.answered(late)
        with pytest.raises(UnavailableError):
            service.ask(StoreGet("k"), 1)
