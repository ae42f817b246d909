"""Writes and reads recordings (`wire/recording.py` is the format)."""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import msgspec
from inferlet.abi import ABI_VERSION
from msgspec import structs

from piehost.wire.client import Ended, Reason
from piehost.wire.recording import (
    ENTRY,
    ENTRY_BIN,
    HEAD_TAG,
    RECORDING_VERSION,
    End,
    Event,
    FromInferlet,
    Garbage,
    Head,
    ToInferlet,
    Written,
)

from .errors import HostError, Refused
from .frames import answers_of, commands_of
from .quotas import QUOTAS

MOST_BYTES: Final = 4 << 30  # of one recording
_BUFFER_BYTES: Final = 1 << 18
_VERB: Final = "piehost launch --record"
_START: Final = msgspec.msgpack.encode(HEAD_TAG)
_START_BYTES: Final = ENTRY.size + 3 + len(_START)  # with the header of an array before it

_decoder: Final = msgspec.msgpack.Decoder(Event)
_encode: Final = msgspec.msgpack.Encoder().encode


class Recorder:
    """Writes one. When it cannot write on it says why, once, and what follows is left out."""

    def __init__(self, path: str) -> None:
        """Makes the file, for its user alone. HostError if it is there, or cannot be made."""
        if not Path(path).is_absolute() or "\0" in path:
            raise Refused(f"{path!r} is not an absolute path", code="bad_path")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags, 0o600)
        except FileExistsError as error:
            raise HostError(
                f"cannot record in {path}",
                "it is there already, and a recording replaces nothing",
                "another name, or remove it",
                "recording",
            ) from error
        except OSError as error:
            why = error.strerror or str(error)
            hint = "a new file in a folder that is there and can be written"
            raise HostError(f"cannot record in {path}", why, hint, "recording") from error
        self._path = path
        self._buffer = bytearray()
        self._written = 0
        self._checksum = 0
        self._failed: Callable[[Reason], None] | None = None  # None: not begun, or over

    def begin(self, head: Head, failed: Callable[[Reason], None]) -> None:
        """`failed` is called if it cannot be written to its end."""
        self._failed = failed
        self.add(head)

    def add(self, event: Event) -> None:
        if self._failed is None:
            return
        body = _encode(event)
        for part in (ENTRY.pack(ENTRY_BIN, len(body)), body):
            self._buffer += part
            self._checksum = zlib.crc32(part, self._checksum)
        if len(self._buffer) >= _BUFFER_BYTES:
            self.flush()

    def close(self, ended: Ended | None) -> None:
        """The run has ended, or (None) nothing came of it: then there is no file."""
        if ended is None:
            Path(self._path).unlink(missing_ok=True)
        elif self._failed is not None:
            reason = ended.reason.code if ended.reason is not None else ""
            end = End(ended.code, reason)
            self.add(structs.replace(end, checksum=_checksum(end, self._checksum)))
            self.flush()
        self._failed = None
        os.close(self._fd)

    def flush(self) -> None:
        """Writes what waits. To be called once all but the end was added: while `failed` counts."""
        self._written += len(self._buffer)
        try:
            if self._written > MOST_BYTES:
                raise OSError(0, f"it would be larger than {MOST_BYTES >> 30} GiB")
            rest = memoryview(self._buffer)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            self._fail(error.strerror or str(error))
        self._buffer = bytearray()

    def _fail(self, why: str) -> None:
        failed, self._failed = self._failed, None
        if failed is not None:
            failed(
                Reason(
                    code="recording",
                    what=f"the recording {self._path} cannot be written on",
                    why=why,
                    hint="make room, or launch without --record",
                )
            )


RunEvent = FromInferlet | ToInferlet | Garbage | Written


class _Entry(NamedTuple):
    number: int  # from 1
    at: int  # octet of the file
    body: bytes
    checksum: int  # of what is before it


class Recording:
    """A recording that was found whole. It is read twice: to check it, and as it is replayed."""

    def __init__(self, path: str) -> None:
        """HostError (code "bad_recording") for anything that is not a whole recording that this
        version reads; OSError if it cannot be read."""
        self.path = path
        self.commands = 0
        with Path(path).open("rb") as file:
            self.head = self._read_head(file)
            self.end = self._check(file)

    def events(self) -> Iterator[RunEvent]:
        """Everything between its head and its end."""
        with Path(self.path).open("rb") as file:
            for entry in self._entries(file):
                event = self._decode(entry)
                if not isinstance(event, Head | End):
                    yield event

    def _read_head(self, file: BinaryIO) -> Head:
        start = file.read(_START_BYTES)
        if len(start) < _START_BYTES and start[:1] in (b"", bytes((ENTRY_BIN,))):
            raise self._cut_off(f"it has {len(start)} octets")
        if start[0] != ENTRY_BIN or _START not in start:
            raise _bad(
                f"{self.path} is no recording",
                "it does not begin as one does",
                f"a file that `{_VERB}` made",
            )
        file.seek(0)
        entry = next(self._entries(file))
        try:
            version = msgspec.msgpack.decode(entry.body)[1]
        except (msgspec.DecodeError, IndexError, ValueError) as error:
            raise self._damaged(entry, str(error)) from error
        if isinstance(version, int) and version > RECORDING_VERSION:
            raise _bad(
                f"{self.path} comes from a later piehost",
                f"its format is {version}, this piehost reads up to {RECORDING_VERSION}",
                "replay it with that piehost, or record again with this one",
            )
        head = self._decode(entry)
        if not isinstance(head, Head) or not head.startup.models:
            raise self._damaged(entry, "the start of the run is not there")
        if head.startup.abi != ABI_VERSION:
            raise _bad(
                f"{self.path} is a run under ABI {head.startup.abi}",
                f"this piehost has ABI {ABI_VERSION}",
                "record again with this piehost",
            )
        limits = head.startup.limits
        for name, size, told in (
            ("out", head.ring_bytes, limits.ring_bytes),
            ("in", head.ring_in_bytes, limits.ring_in_bytes),
        ):
            most = QUOTAS["ring_bytes"].high
            if size % mmap.PAGESIZE or not 0 < told <= size <= most:
                why = f"its ring {name} has {size} octets, and the inferlet was told {told}"
                raise self._damaged(entry, why)
        return head

    def _check(self, file: BinaryIO) -> End:
        """Reads all of it."""
        file.seek(0)
        for entry in self._entries(file):
            event = self._decode(entry)
            if isinstance(event, Head) and entry.at:
                raise self._damaged(entry, "a second start of a run")
            if isinstance(event, FromInferlet):
                self.commands += len(commands_of(event.body) or ())
            if isinstance(event, ToInferlet) and answers_of(event.body) is None:
                raise self._damaged(entry, "what the inferlet was told is no list of answers")
            if isinstance(event, End):
                if event.checksum != _checksum(event, entry.checksum):
                    raise self._damaged(entry, "the checksum is another")
                if file.read(1):
                    raise self._damaged(entry, "something follows it")
                return event
        raise self._cut_off("the end of the run is not in it")

    def _entries(self, file: BinaryIO) -> Iterator[_Entry]:
        size = os.fstat(file.fileno()).st_size
        at = checksum = 0
        number = 1
        while header := file.read(ENTRY.size):
            if len(header) < ENTRY.size:
                raise self._cut_off(f"entry {number} has no whole header")
            kind, length = ENTRY.unpack(header)
            if kind != ENTRY_BIN:
                entry = _Entry(number, at, b"", checksum)
                raise self._damaged(entry, f"octet {kind:02x} where an entry begins")
            if at + ENTRY.size + length > size:
                raise self._cut_off(f"of entry {number}, {size - at} octets are there")
            body = file.read(length)
            yield _Entry(number, at, body, checksum)
            checksum = zlib.crc32(body, zlib.crc32(header, checksum))
            at += ENTRY.size + length
            number += 1

    def _decode(self, entry: _Entry) -> Event:
        try:
            event: Event = _decoder.decode(entry.body)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise self._damaged(entry, str(error)) from error
        return event

    def _damaged(self, entry: _Entry, why: str) -> HostError:
        where = f"entry {entry.number} (at octet {entry.at}): {why}"
        return _bad(f"{self.path} is damaged", where, f"record again: {_VERB} FILE PROGRAM")

    def _cut_off(self, why: str) -> HostError:
        return _bad(
            f"{self.path} is cut off",
            f"{why}: the disk was full, the host was killed, or the run goes on",
            f"record again: {_VERB} FILE PROGRAM",
        )


def _checksum(end: End, before: int) -> int:
    """That of a whole recording; `before`: of the octets before its last entry."""
    return zlib.crc32(_encode(structs.replace(end, checksum=0)), before)


def _bad(what: str, why: str, hint: str) -> HostError:
    return HostError(what, why, hint, "bad_recording")
