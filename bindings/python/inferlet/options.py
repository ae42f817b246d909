"""A function's parameters as the options of a command line, and the help that says so."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

REQUIRED = inspect.Parameter.empty
_NOUNS = {int: "a whole number", float: "a number", str: "a text"}


class UsageError(Exception):
    """The command line is wrong: said in one line."""


@dataclass(frozen=True)
class Option:
    """One parameter."""

    name: str  # of the parameter
    kind: type  # str, int, float or bool
    default: object
    choices: dict[str, object] | None = None  # what may be written, and what it means
    repeated: bool = False  # a list: each time it is given adds one
    about: str = ""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def parse(self, text: str) -> object:
        """The value of `text`. UsageError if it is none."""
        if self.choices is not None:
            if text not in self.choices:
                raise UsageError(f"{self.flag} is one of {', '.join(self.choices)}, not {text!r}")
            return self.choices[text]
        try:
            return self.kind(text)
        except ValueError:
            raise UsageError(f"{self.flag} takes {_NOUNS[self.kind]}, not {text!r}") from None

    def help(self) -> str:
        """Its line of the help."""
        if self.kind is bool:
            usage = f"{self.flag}, --no-{self.flag[2:]}"
        elif self.choices is not None:
            usage = f"{self.flag} {'|'.join(self.choices)}"
        else:
            usage = f"{self.flag} {self.kind.__name__.upper()}"
        notes = [self.about] if self.about else []
        if self.repeated:
            notes.append("may be repeated")
        if self.default is REQUIRED:
            notes.append("required")
        elif self.default not in (None, (), []):
            notes.append(f"default: {self._written(self.default)}")
        return f"  {usage:<28} {'; '.join(notes)}".rstrip()

    def _written(self, value: object) -> str:
        """`value` as it would be given."""
        if isinstance(value, list | tuple):
            return " ".join(map(self._written, value))
        return next((k for k, v in (self.choices or {}).items() if v == value), str(value))


def option_of(program: str, parameter: inspect.Parameter, hint: Any, about: str) -> Option:
    """The option of a parameter, annotated `hint`, of `program`. TypeError if it can be none."""
    if typing.get_origin(hint) is typing.Annotated:
        hint, *extras = typing.get_args(hint)
        about = next((extra for extra in extras if isinstance(extra, str)), about)
    kind, repeated = _without_none(hint), False
    if typing.get_origin(kind) in (list, Sequence):
        (kind,), repeated = typing.get_args(kind), True
    choices: dict[str, object] | None = None
    if typing.get_origin(kind) is typing.Literal:
        choices = {str(value): value for value in typing.get_args(kind)}
        kind = str
    elif isinstance(kind, type) and issubclass(kind, Enum):
        choices = {str(member.value): member for member in kind}
        kind = str
    by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    if kind not in (str, int, float, bool) or not by_name or (repeated and kind is bool):
        raise TypeError(
            f"parameter {parameter.name} of {program} cannot be an option: annotate it str, int, "
            "float, bool, Literal[...], an Enum, or a list of these (or Model or Queue)"
        )
    default = parameter.default
    if default is REQUIRED and (kind is bool or repeated):
        default = False if kind is bool else ()
    return Option(parameter.name, kind, default, choices, repeated, about)


def _without_none(kind: Any) -> Any:
    """`kind` without `| None`."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        plain = [part for part in typing.get_args(kind) if part is not types.NoneType]
        return plain[0] if len(plain) == 1 else kind
    return kind


def parse(options: dict[str, Option], words: Sequence[str]) -> dict[str, object]:
    """Parameter values of a command line; `options` by flag. The word after an option is its value,
    whatever it begins with. UsageError if the command line is wrong."""
    values: dict[str, object] = {}
    rest = iter(words)
    for word in rest:
        flag, equals, text = word.partition("=")
        option = options.get(flag)
        if option is None:
            off = options.get("--" + flag[5:]) if flag.startswith("--no-") and not equals else None
            if off is None or off.kind is not bool:
                raise UsageError(f"there is no option {word!r}")
            values[off.name] = False
        elif option.kind is bool:
            if equals:
                raise UsageError(f"{flag} takes no value")
            values[option.name] = True
        else:
            value = option.parse(text if equals else _next_word(rest, flag))
            if option.repeated:
                given = values.setdefault(option.name, [])
                assert isinstance(given, list)
                given.append(value)
            else:
                values[option.name] = value
    for option in options.values():
        if option.name not in values:
            if option.default is REQUIRED:
                raise UsageError(f"{option.flag} is required")
            default = option.default
            values[option.name] = list(default) if isinstance(default, list | tuple) else default
    return values


def _next_word(rest: Iterator[str], flag: str) -> str:
    word = next(rest, None)
    if word is None:
        raise UsageError(f"{flag} needs a value")
    return word


def documented(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """(docstring without its `Args:` section, what that says of each parameter)."""
    lines = (inspect.getdoc(function) or "").splitlines()
    begin = next((i for i, line in enumerate(lines) if line.strip() == "Args:"), len(lines))
    end = begin + 1
    about: dict[str, str] = {}
    name = ""
    while end < len(lines) and (lines[end].startswith(" ") or not lines[end].strip()):
        line = lines[end]
        end += 1
        indent = len(line) - len(line.lstrip())
        head, colon, text = line.partition(":")
        if indent <= 4 and colon and " " not in (word := head.split("(")[0].strip()):
            name = word
            about[name] = text.strip()
        elif line.strip() and name:
            about[name] += " " + line.strip()
    rest = lines[:begin] + lines[end:]
    return "\n".join(rest).strip(), about
