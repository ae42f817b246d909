"""The store's file: SQLite, shared safely by the stores of several hosts.

Write-ahead logging with synchronous=NORMAL: what was committed survives the death of our processes;
a power failure may take the last commits with it, but not damage the file.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from inferlet.abi import MAX_LISTED
from inferlet.errors import InferletError, QuotaError, UnavailableError

from piehost.wire.services import (
    StoreCall,
    StoreDelete,
    StoreExists,
    StoreGet,
    StoreList,
    StoreSet,
    StoreUsed,
)

# how long another store's transaction is waited for; they take milliseconds
BUSY_SECONDS: Final = 5.0
_APPLICATION_ID: Final = 0x70696573  # "pies": whose file it is, in SQLite's header
_VERSION: Final = 1
_MAX_LISTED_BYTES: Final = 60000  # of the keys of one answer, with their heads: it fits a frame

# Keys are blobs, so that they compare by their octets. The totals are those of the entries, always:
# both change in one transaction.
_SCHEMA: Final = (
    "CREATE TABLE entries (user TEXT NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL,"
    " UNIQUE (user, key))",
    "CREATE TABLE totals (user TEXT PRIMARY KEY, octets INTEGER NOT NULL) WITHOUT ROWID",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {_VERSION}",
)
_WRITES: Final = (StoreSet, StoreDelete)


class Database:
    """Opens the file when it is first needed, and again after it failed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._logged = ""  # the last failure, so that one does not fill the log

    def carry_out(self, asks: Sequence[tuple[str, int, StoreCall]]) -> list[object]:
        """The answer to each (user, store_bytes, call), in order; an InferletError where it failed.

        All are one transaction, so that many cost little more than one. If it fails, each is tried
        by itself: one that cannot be done undoes no other. When this returns, it is committed.
        """
        try:
            return self._transaction(asks)
        except (sqlite3.Error, OSError) as error:
            refusal = self._refusal(error)
            if len(asks) == 1:
                return [refusal]
            # after one wait for a lock there shall not be another for each call
            waited = _is_busy(error)
            return [
                refusal if waited and isinstance(ask[2], _WRITES) else self.carry_out([ask])[0]
                for ask in asks
            ]

    def _transaction(self, asks: Sequence[tuple[str, int, StoreCall]]) -> list[object]:
        connection = self._opened()
        writes = any(isinstance(call, _WRITES) for _, _, call in asks)
        connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
        try:
            answers = [_call(connection, *ask) for ask in asks]
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # SQLite ends it itself when the disk is full
                connection.execute("ROLLBACK")
            raise
        return answers

    # --- the file ---------------------------------------------------------------------------

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = _open(self._path)
        return self._connection

    def _refusal(self, error: Exception) -> UnavailableError:
        """What the inferlet is told; a file that is not as it should be is opened anew next time.

        The file's path is for the log alone: it is none of the inferlet's business.
        """
        if (text := str(error)) != self._logged:
            self._logged = text
            sys.stderr.write(f"piehost store: {self._path}: {text}\n")
        if _is_busy(error):
            return UnavailableError(
                f"the store is locked by another process for more than {BUSY_SECONDS:g} s",
                "try again; if it stays so, look for a stopped piehost or a backup that holds it",
            )
        if self._connection is not None and not _is_full(error):
            self._connection.close()
            self._connection = None
        if _is_full(error):
            return UnavailableError(
                f"the store cannot write: {error}", "make room on the disk that holds it"
            )
        why = error.strerror if isinstance(error, OSError) else error
        return UnavailableError(
            f"the store cannot use its file: {why}",
            "piehost's log names the file: see that it can be written and is undamaged, or move it"
            " away, and a new one is made",
        )


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # private from the start
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        _use_wal(connection)
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("BEGIN IMMEDIATE")  # two stores may find the file new at once
        _check_or_make(connection)
        connection.execute("COMMIT")
    except BaseException:
        connection.close()
        raise
    return connection


def _use_wal(connection: sqlite3.Connection) -> None:
    """SQLite does not wait by itself where the mode of a file in use is to change."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if not _is_busy(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _check_or_make(connection: sqlite3.Connection) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if (application, version, tables) == (0, 0, 0):
        for statement in _SCHEMA:
            connection.execute(statement)
    elif application != _APPLICATION_ID:
        raise sqlite3.DatabaseError("it is the database of another program")
    elif version != _VERSION:
        raise sqlite3.DatabaseError(f"it has version {version}, this piehost reads {_VERSION}")


def _is_busy(error: Exception) -> bool:
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)


def _is_full(error: Exception) -> bool:
    """Writing failed; reading may go on."""
    return _code(error) == sqlite3.SQLITE_FULL or (
        getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_IOERR_WRITE
    )


def _code(error: Exception) -> int | None:
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


# --- the calls ----------------------------------------------------------------------------------


def _call(connection: sqlite3.Connection, user: str, quota: int, call: StoreCall) -> object:
    """A call's answer, or the InferletError it is answered with, which then changed nothing."""
    match call:
        case StoreGet():
            return _value(connection, user, call.key.encode())
        case StoreSet():
            return _set(connection, user, quota, call.key.encode(), call.value)
        case StoreDelete():
            return _delete(connection, user, call.key.encode())
        case StoreExists():
            return _size(connection, user, call.key.encode()) is not None
        case StoreList():
            return _list(connection, user, call.prefix.encode(), call.after.encode())
        case StoreUsed():
            return _used(connection, user)


def _value(connection: sqlite3.Connection, user: str, key: bytes) -> bytes | None:
    row = connection.execute(
        "SELECT value FROM entries WHERE user = ? AND key = ?", (user, key)
    ).fetchone()
    return None if row is None else bytes(row[0])


def _size(connection: sqlite3.Connection, user: str, key: bytes) -> int | None:
    """Octets of the value."""
    row = connection.execute(
        "SELECT length(value) FROM entries WHERE user = ? AND key = ?", (user, key)
    ).fetchone()
    return None if row is None else int(row[0])


def _used(connection: sqlite3.Connection, user: str) -> int:
    row = connection.execute("SELECT octets FROM totals WHERE user = ?", (user,)).fetchone()
    return 0 if row is None else int(row[0])


def _set(
    connection: sqlite3.Connection, user: str, quota: int, key: bytes, value: bytes
) -> InferletError | None:
    old = _size(connection, user, key)
    used = _used(connection, user)
    change = len(value) - old if old is not None else len(key) + len(value)
    if used + change > quota:
        return QuotaError(
            f"the user's keys and values would take {used + change} octets, of {quota}",
            "store_delete something, or launch with a larger --quota store_bytes",
        )
    connection.execute(
        "INSERT INTO entries VALUES (?, ?, ?)"
        " ON CONFLICT (user, key) DO UPDATE SET value = excluded.value",
        (user, key, value),
    )
    _add(connection, user, change)
    return None


def _delete(connection: sqlite3.Connection, user: str, key: bytes) -> bool:
    size = _size(connection, user, key)
    if size is None:
        return False
    connection.execute("DELETE FROM entries WHERE user = ? AND key = ?", (user, key))
    _add(connection, user, -(len(key) + size))
    return True


def _add(connection: sqlite3.Connection, user: str, octets: int) -> None:
    connection.execute(
        "INSERT INTO totals VALUES (?, ?)"
        " ON CONFLICT (user) DO UPDATE SET octets = octets + excluded.octets",
        (user, octets),
    )


def _list(connection: sqlite3.Connection, user: str, prefix: bytes, after: bytes) -> list[str]:
    """The keys with `prefix` beyond `after`, in order, as many as an answer holds."""
    first = max(prefix, after + b"\0") if after else prefix
    rows = connection.execute(
        "SELECT key FROM entries WHERE user = ? AND key >= ? ORDER BY key LIMIT ?",
        (user, first, MAX_LISTED),
    )
    keys: list[str] = []
    octets = 0
    for (key,) in rows:
        octets += len(key) + 3  # msgpack's head of a string
        if not key.startswith(prefix) or octets > _MAX_LISTED_BYTES:
            break
        keys.append(key.decode())
    return keys
