"""piehost.toml: what the operator gives users and programs, as defaults and ceilings at once.

    [quota]                  # of all
    kv_pages = 512
    [user.ada.quota]         # of what ada launches; wins over [quota]
    kv_pages = 2048
    [program.agent.quota]    # of the program of that name; wins over both
    cpu = "50%"

Each table may have `egress = [...]` too, the ceiling of what launches may grant. What `piehost
serve` is given on its command line wins over all of the file.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from . import egress_grants
from .allotment import Ceiling
from .errors import HostError
from .quotas import parse_value
from .regular_file import read_start

_NAME: Final = "piehost.toml"
_SYSTEM: Final = Path("/etc/piehost") / _NAME
_MAX_BYTES: Final = 1 << 20
_SERVE: Final = "piehost serve"  # its command line, as a source


class Table(Struct, forbid_unknown_fields=True):
    quota: dict[str, Any] = {}  # checked by `parse_value`, which can name the key
    egress: list[str] | None = None


class Config(Table, forbid_unknown_fields=True):
    user: dict[str, Table] = {}
    program: dict[str, Table] = {}

    def tables(self) -> Iterator[tuple[str, Table]]:
        """All, with how the file names them."""
        yield "", self
        yield from ((f"user.{name}", table) for name, table in self.user.items())
        yield from ((f"program.{name}", table) for name, table in self.program.items())


def find() -> Path | None:
    """The user's file if there is one, else the system's (XDG base directory specification)."""
    base = os.environ.get("XDG_CONFIG_HOME")
    if not (base and Path(base).is_absolute()):
        home = os.environ.get("HOME")
        base = str(Path(home) / ".config") if home else None
    own = [Path(base) / "piehost" / _NAME] if base else []
    return next((path for path in (*own, _SYSTEM) if _exists(path)), None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:  # who cannot see the ceilings must not go on without them
        return True


def load(path: Path) -> Config:
    """HostError (code "bad_config") says what is wrong, and where."""
    try:
        data = read_start(path, _MAX_BYTES + 1)
    except OSError as error:
        raise _bad(
            path, error.strerror or str(error), "check the path and its permissions"
        ) from error
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError(f"over {_MAX_BYTES} octets")
        config = msgspec.convert(tomllib.loads(data.decode()), Config)
    except (ValueError, RecursionError) as error:  # TOML, UTF-8 and msgspec errors are ValueErrors
        tables = "[quota], [user.NAME.quota], [program.NAME.quota], and egress = [...] in each"
        raise _bad(path, str(error).replace("`$.", "`"), f"there may be: {tables}") from error
    for name, table in config.tables():
        _check(path, name, table)
    return config


def _check(path: Path, name: str, table: Table) -> None:
    section = f"[{name}.quota]" if name else "[quota]"
    try:
        for key, value in table.quota.items():
            parse_value(key, value, f"{section} of {path}")
        egress_grants.check(
            table.egress or (), asked_in=f"egress of [{name}]" if name else "egress"
        )
    except HostError as error:
        reason = error.reason
        why = f"{reason.what}; {reason.why}" if reason.why else reason.what
        raise _bad(path, why, reason.hint) from error


def _bad(path: Path, why: str, hint: str) -> HostError:
    return HostError(f"the configuration {path} cannot be used", why, hint, "bad_config")


class Settings:
    """What the operator gives: the file, and over it the command line of `piehost serve`."""

    def __init__(
        self, path: str | None, quotas: Mapping[str, str], egress: list[str] | None
    ) -> None:
        """HostError if there is a file at `path` and it is wrong."""
        self.path = path
        self._quotas = {key: parse_value(key, value, _SERVE) for key, value in quotas.items()}
        self._egress = egress
        self._config = Config()
        self.reload()

    def reload(self) -> None:
        """Reads the file again, for launches from now on. HostError if it is wrong: what was read
        before stays."""
        if self.path is not None:
            self._config = load(Path(self.path))

    def ceilings(self, user: str, program: str) -> dict[str, Ceiling]:
        """By quota, for launches by `user` of the program of that name."""
        ceilings: dict[str, Ceiling] = {}
        for name, table in self._tables(user, program).items():
            where = f"{_NAME} [{name}.quota]" if name else f"{_NAME} [quota]"
            for key, value in table.quota.items():
                ceilings[key] = Ceiling(parse_value(key, value, where), where)
        for key, number in self._quotas.items():
            ceilings[key] = Ceiling(number, f"{_SERVE} --quota")
        return ceilings

    def check_egress(self, asked: list[str], user: str, program: str) -> None:
        """Refused unless all of `asked` are grants within what the operator allows."""
        ceiling, where = None, ""
        for name, table in self._tables(user, program).items():
            if table.egress is not None:
                ceiling, where = table.egress, f"{_NAME} [{name}]" if name else _NAME
        if self._egress is not None:
            ceiling, where = self._egress, f"`{_SERVE} --egress`"
        egress_grants.check(asked, ceiling, ceiling_in=where)

    def _tables(self, user: str, program: str) -> dict[str, Table]:
        """Those that matter, by how the file names them, the most specific last."""
        tables: dict[str, Table] = {"": self._config}
        if user in self._config.user:
            tables[f"user.{user}"] = self._config.user[user]
        if program in self._config.program:
            tables[f"program.{program}"] = self._config.program[program]
        return tables
