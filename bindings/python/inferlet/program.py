"""`@inferlet`: a function as a program. Its parameters are the command line, what it yields or
returns goes to whoever launched it."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import traceback
import types
import typing
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .abi import MAX_MESSAGE_BYTES
from .errors import InferletError
from .model import Model, available_models
from .queue import Queue
from .runtime import args, flush, send

F = TypeVar("F", bound=Callable[..., Any])

_REQUIRED = inspect.Parameter.empty
_EXIT_ERROR = 1
_EXIT_USAGE = 2


def inferlet(function: F) -> F:
    """Runs `function` if its script is the program; put it last in the script.

    Parameters annotated `Model` get the first model, `Queue` a queue on it that is destroyed at
    the end. The others are options: `max_tokens: int = 16` is `--max-tokens N`, a bool is
    `--flag` or `--no-flag`, one without a default is required; str, int, float, bool, each also
    `| None`. `--help` prints them, with the function's docstring. Every str or bytes that the
    function (plain, generator, async or both) yields or returns is sent.

    Exits with 1 after an `InferletError`, which is printed on one line (`--debug` or
    PIEHOST_DEBUG adds the traceback), and with 2 for a wrong command line. TypeError, when
    decorating, for a parameter that cannot be an option.
    """
    program = _Program(function)
    if function.__module__ == "__main__":
        status = program.main()
        if status:
            sys.exit(status)
    return function


class _UsageError(Exception):
    pass


@dataclass(frozen=True)
class _Option:
    name: str  # of the parameter
    kind: type  # str, int, float or bool
    default: object

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def parse(self, text: str) -> object:
        try:
            return self.kind(text)
        except ValueError:
            raise _UsageError(f"{self.flag} takes {_NOUNS[self.kind]}, not {text!r}") from None

    def usage(self) -> str:
        if self.kind is bool:
            return f"{self.flag}, --no-{self.flag[2:]}"
        return f"{self.flag} {self.kind.__name__.upper()}"


_NOUNS = {int: "a whole number", float: "a number", str: "a text"}


class _Program:
    """A function, and its parameters split into what is injected and what is an option."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.options: dict[str, _Option] = {}
        self.injected: dict[str, type] = {}
        hints = typing.get_type_hints(function)
        for parameter in inspect.signature(function).parameters.values():
            kind = hints.get(parameter.name, str)
            if kind in (Model, Queue):
                self.injected[parameter.name] = kind
                continue
            kind = _plain(kind)
            if kind not in (str, int, float, bool) or parameter.kind in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
                parameter.POSITIONAL_ONLY,
            ):
                raise TypeError(
                    f"parameter {parameter.name} of {function.__name__} cannot be an option: "
                    "annotate it str, int, float or bool (or Model or Queue)"
                )
            default = parameter.default
            if kind is bool and default is _REQUIRED:
                default = False
            option = _Option(parameter.name, kind, default)
            self.options[option.flag] = option

    def main(self) -> int:
        """Runs it with this process's arguments; the exit status."""
        debug = "PIEHOST_DEBUG" in os.environ
        try:
            words = args()
            debug = debug or "--debug" in words
            if "--help" in words:
                _send_text(self.help())
            else:
                self.run(self.parse([word for word in words if word != "--debug"]))
            flush()
        except _UsageError as error:
            _print_error(f"error: {error} (try: --help)")
            return _EXIT_USAGE
        except InferletError as error:
            if debug:
                traceback.print_exc()
            else:
                _print_error(f"error: {' '.join(str(error).split())}")
            with contextlib.suppress(InferletError):
                flush()
            return _EXIT_ERROR
        return 0

    def parse(self, words: Sequence[str]) -> dict[str, object]:
        """Parameter values of a command line. The word after an option is its value, whatever it
        begins with."""
        values: dict[str, object] = {}
        rest = iter(words)
        for word in rest:
            flag, equals, text = word.partition("=")
            option = self.options.get(flag)
            if option is None and flag.startswith("--no-") and not equals:
                option = self.options.get("--" + flag[5:])
                if option is not None and option.kind is bool:
                    values[option.name] = False
                    continue
                option = None
            if option is None:
                raise _UsageError(f"there is no option {word!r}")
            if option.kind is bool:
                if equals:
                    raise _UsageError(f"{flag} takes no value")
                values[option.name] = True
                continue
            if not equals:
                value = next(rest, None)
                if value is None:
                    raise _UsageError(f"{flag} needs a value")
                text = value
            values[option.name] = option.parse(text)
        for option in self.options.values():
            if option.name not in values:
                if option.default is _REQUIRED:
                    raise _UsageError(f"{option.flag} is required")
                values[option.name] = option.default
        return values

    def run(self, values: dict[str, object]) -> None:
        with contextlib.ExitStack() as stack:
            for name, kind in self.injected.items():
                models = available_models()
                if not models:
                    raise InferletError("this host serves no model", "give it one with --model")
                values[name] = (
                    models[0] if kind is Model else stack.enter_context(models[0].queue())
                )
            result = self.function(**values)
            if isinstance(result, AsyncIterator) or inspect.isawaitable(result):
                import asyncio  # most programs do not need it and it is slow to import

                asyncio.run(_send_async(result))
            else:
                _send_result(result)

    def help(self) -> str:
        lines = ["usage: piehost launch PROGRAM -- [OPTIONS]"]
        if about := inspect.getdoc(self.function):
            lines += ["", about]
        lines += ["", "options:"]
        for option in self.options.values():
            if option.default is _REQUIRED:
                note = "required"
            elif option.default is None:
                note = ""
            else:
                note = f"default: {option.default}"
            lines.append(f"  {option.usage():<28} {note}".rstrip())
        lines.append("  --help")
        return "\n".join(lines) + "\n"


def _plain(kind: Any) -> Any:
    """`kind` without `| None`."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        plain = [part for part in typing.get_args(kind) if part is not types.NoneType]
        return plain[0] if len(plain) == 1 else kind
    return kind


def _send_result(result: object) -> None:
    if isinstance(result, Iterator):
        for piece in result:
            _send_text(piece)
    else:
        _send_text(result)


async def _send_async(result: Any) -> None:
    if isinstance(result, AsyncIterator):
        async for piece in result:
            _send_text(piece)
    else:
        _send_result(await result)


def _send_text(piece: object) -> None:
    """Sends `piece`; a long one in several messages."""
    if piece is None:
        return
    data = piece if isinstance(piece, bytes) else str(piece).encode()
    for at in range(0, len(data), MAX_MESSAGE_BYTES):
        send(data[at : at + MAX_MESSAGE_BYTES])


def _print_error(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
