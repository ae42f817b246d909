"""`@inferlet`: a function as a program. Its parameters are the command line, what it yields or
returns goes to whoever launched it."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import typing
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

from .abi import MAX_MESSAGE_BYTES
from .errors import ArgumentError, InferletError
from .future import Future
from .model import Model, available_models
from .options import Option, UsageError, documented, option_of, parse
from .queue import Queue
from .runtime import args, flush, send

F = TypeVar("F", bound=Callable[..., Any])

_BY_NAME = {"model": Model, "queue": Queue}  # of parameters without an annotation
_EXIT_ERROR = 1
_EXIT_USAGE = 2


def inferlet(function: F) -> F:
    """Runs `function` if its script is the program; put it last in the script.

    Parameters annotated `Model`, or called `model` without an annotation, get the first model,
    `Queue` or `queue` a queue on it that is destroyed at the end. The others are options:
    `max_tokens: int = 16` is `--max-tokens N`, a bool is `--flag` or `--no-flag`, one without a
    default is required; str, int, float, bool, `Literal` and Enum (by value) for a choice, each
    also `| None`, and lists of them for an option that may be repeated. `--help` prints them with
    the function's docstring, and what its `Args:` section, or `Annotated[int, "..."]`, says of
    each.

    Every str or bytes that the function (plain, generator, async or both) yields or returns is
    sent; a `Future` is waited for. What was sent leaves when the program next waits for an answer,
    or ends: `flush()` before it sleeps or computes for long.

    Exits with 1 after an `InferletError`, which is printed on one line (`--debug` or
    PIEHOST_DEBUG adds the traceback), and after any other exception, whose traceback begins with
    the function's own frame; with 2 for a wrong command line. TypeError, when
    decorating, for a parameter that cannot be an option.
    """
    program = _Program(function)
    if function.__module__ == "__main__":
        status = program.main()
        if status:
            sys.exit(status)
    return function


class _Program:
    """A function, and its parameters split into what is injected and what is an option."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.options: dict[str, Option] = {}
        self.injected: dict[str, type] = {}
        self.about, notes = documented(function)
        hints = typing.get_type_hints(function, include_extras=True)
        for parameter in inspect.signature(function).parameters.values():
            kind = hints.get(parameter.name, _BY_NAME.get(parameter.name, str))
            if kind in (Model, Queue):
                self.injected[parameter.name] = kind
            else:
                about = notes.get(parameter.name, "")
                option = option_of(function.__name__, parameter, kind, about)
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
                self.run(parse(self.options, [word for word in words if word != "--debug"]))
            flush()
        except UsageError as error:
            _print_error(f"error: {error} (try: --help)")
            return _EXIT_USAGE
        except InferletError as error:
            if debug:
                _print_traceback(error)
            else:
                _print_error(f"error: {' '.join(str(error).split())}")
            with contextlib.suppress(InferletError):
                flush()
            return _EXIT_ERROR
        except Exception as error:
            _print_traceback(error)
            return _EXIT_ERROR
        return 0

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
        if self.about:
            lines += ["", self.about]
        lines += ["", "options:", *(option.help() for option in self.options.values())]
        return "\n".join([*lines, "  --help"]) + "\n"


def _send_result(result: object) -> None:
    if not isinstance(result, Iterator):
        _send_text(result)
        return
    while True:
        try:
            piece = next(result)
        except StopIteration as end:
            _send_text(end.value)  # of a generator that also returns something
            return
        _send_text(piece)


async def _send_async(result: Any) -> None:
    if isinstance(result, AsyncIterator):
        async for piece in result:
            _send_text(piece)
    else:
        _send_result(await result)


def _send_text(piece: object) -> None:
    """Sends `piece`; a long one in several messages. ArgumentError if it is a stream."""
    if isinstance(piece, Future):
        piece = piece.result()
    if piece is None:
        return
    if isinstance(piece, Iterator | AsyncIterator):
        raise ArgumentError(
            f"the program yields a {type(piece).__name__}, which is no text but gives pieces of it",
            "`yield from` it, or in an async function `async for` it and yield each",
        )
    data = piece if isinstance(piece, bytes) else str(piece).encode()
    for at in range(0, len(data), MAX_MESSAGE_BYTES):
        send(data[at : at + MAX_MESSAGE_BYTES])


def _print_traceback(error: Exception) -> None:
    """As Python would, without the frames of this file and of the event loop that it runs, which
    come before the function's own."""
    own = _print_traceback.__code__.co_filename
    at = trace = error.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename == own and at.tb_next is not None:
            trace = at.tb_next
        at = at.tb_next
    sys.excepthook(type(error), error.with_traceback(trace), trace)
    sys.stderr.flush()


def _print_error(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
