"""The user's store: small values by key, kept across restarts of piehost."""

from __future__ import annotations

from typing import Any

from .abi import (
    MAX_MESSAGE_BYTES,
    MAX_TOPIC_BYTES,
    Command,
    StoreDelete,
    StoreExists,
    StoreGet,
    StoreList,
    StoreSet,
)
from .checks import bounded, name_of, text
from .future import Answer, Future, nothing, same
from .runtime import runtime
from .series import Listing


def store_get(key: str) -> Future[bytes | None]:
    """The value of `key`, None if there is none. ArgumentError, like the others here, if `key` is
    not 1 to 256 octets; UnavailableError if the store has failed."""
    return _ask(StoreGet(None, name_of("the key", key)))


def store_set(key: str, value: str | bytes) -> Future[None]:
    """Sets `key`. Once answered, not even a crash of piehost loses it. ArgumentError if `value` is
    longer than 60,000 octets, QuotaError beyond `limits.store_bytes`: then nothing changes."""
    data = bounded("the value", value, MAX_MESSAGE_BYTES, "keep it under several keys")
    command = StoreSet(None, name_of("the key", key), data)
    return runtime.connection.ask(command, Answer(runtime.connection, nothing))


def store_delete(key: str) -> Future[bool]:
    """Removes `key`; False if it was not there."""
    return _ask(StoreDelete(None, name_of("the key", key)))


def store_exists(key: str) -> Future[bool]:
    """True if `key` has a value."""
    return _ask(StoreExists(None, name_of("the key", key)))


def store_list(prefix: str = "") -> Listing[str]:
    """The keys that begin with `prefix`, in the order of their octets: all by `.result()` or
    `await`, or one by one by `for` and `async for`."""
    text("the prefix", prefix, MAX_TOPIC_BYTES)
    return Listing(lambda after: _ask(StoreList(None, prefix, after)), lambda key: key)


def _ask(command: Command) -> Future[Any]:
    return runtime.connection.ask(command, Answer(runtime.connection, same))
