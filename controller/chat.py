"""Text to token ids: `tokenize`, and `chat` by the model's own template.

Templates render as transformers renders them (`utils/chat_template_utils.py`, version 5), so that
a prompt is what the model was trained on. A template is a program that comes with the model, and
the messages are an inferlet's, so what a rendering may take is bounded.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping
from datetime import datetime
from types import FrameType
from typing import Any, Final

from inferlet import abi
from inferlet.abi import ModelInfo
from inferlet.errors import ArgumentError, InferletError, TraitError
from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from tokenizers import Tokenizer

from .seat import Seat

MAX_RENDERED: Final = 1 << 16  # characters of a rendered chat
MAX_RENDER_SECONDS: Final = 0.1  # of processor time
_MAX_IDS: Final = (abi.MAX_FRAME_BYTES - 64) // 5  # five octets an id at most
_MOST_REASON: Final = 1000  # characters of a template's or the tokenizer's own words


class Text:
    """`special_tokens`: the tokenizer's own, by names such as "bos_token"."""

    def __init__(
        self, tokenizer: Tokenizer, model: ModelInfo, special_tokens: Mapping[str, str]
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template: ChatTemplate | None = None
        if model.chat_template is not None:
            self._chat_template = ChatTemplate(model.chat_template, special_tokens)
        self.handlers: dict[type[abi.Command], Callable[[Seat, Any], None]] = {
            abi.Tokenize: self._tokenize,
            abi.Chat: self._chat,
        }

    def _tokenize(self, seat: Seat, c: abi.Tokenize) -> None:
        check_model(c.model)
        size = len(c.text.encode())
        if size > abi.MAX_TOKENIZE_BYTES:
            raise ArgumentError(
                f"a text of {size} octets; the most is {abi.MAX_TOKENIZE_BYTES}",
                "tokenize it in parts, split where a token surely ends",
            )
        seat.answer(c.req, self._ids(c.text, c.special))

    def _chat(self, seat: Seat, c: abi.Chat) -> None:
        check_model(c.model)
        if self._chat_template is None:
            raise TraitError(
                "the model has no chat template", "write the prompt yourself and tokenize it"
            )
        text = self._chat_template.render(c.messages, c.generation_prompt)
        seat.answer(c.req, self._ids(text, False))

    def _ids(self, text: str, special: bool) -> list[int]:
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=special)
        except Exception as error:  # the library's only type; not every tokenizer takes any text
            raise ArgumentError(
                f"the model's tokenizer refuses this text: {_first_line(error)}",
                "leave out rare characters",
            ) from error
        ids: list[int] = encoding.ids
        if len(ids) > _MAX_IDS:
            raise ArgumentError(
                f"{len(ids)} tokens do not fit one answer ({_MAX_IDS})",
                "tokenize it in parts, split where a token surely ends",
            )
        return ids


class ChatTemplate:
    """A model's Jinja template. One that does not parse refuses all messages."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(
            raise_exception=_raise_exception,
            strftime_now=lambda form: datetime.now().strftime(form),
            namespace=_Namespace,
            dict=lambda *args, **kwargs: dict(*args, **kwargs),  # not the class: it has attributes
        )
        self._special_tokens = special_tokens
        self._broken: str | None = None
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            self._broken = _first_line(error)

    def render(self, messages: list[dict[str, Any]], generation_prompt: bool) -> str:
        """ArgumentError if the template refuses the messages, or takes too long over them."""
        if self._broken is not None:
            raise TraitError(
                f"the model's chat template does not parse: {self._broken}",
                "write the prompt yourself and tokenize it",
            )
        if not messages:
            raise ArgumentError("a chat without messages", "give at least one")
        for i, message in enumerate(messages):
            if missing := {"role", "content"} - message.keys():
                raise ArgumentError(
                    f"message {i} has no {' and no '.join(sorted(missing))}", "give it one"
                )
        try:
            with _ProcessorTime(MAX_RENDER_SECONDS):
                return self._rendered(messages, generation_prompt)
        except InferletError:
            raise
        except _OutOfTime as error:
            raise ArgumentError(
                f"the chat takes more than {MAX_RENDER_SECONDS} seconds to render",
                "send fewer or simpler messages",
            ) from error
        except Exception as error:  # a template may do anything that Python expressions do
            raise ArgumentError(
                f"the model's chat template refuses the messages: {_first_line(error)}",
                "see `chat_template` of the model for what it takes",
            ) from error

    def _rendered(self, messages: list[dict[str, Any]], generation_prompt: bool) -> str:
        pieces: list[str] = []
        size = 0
        for piece in self._template.generate(
            messages=[{k: v for k, v in m.items() if v is not None} for m in messages],
            tools=None,
            documents=None,
            add_generation_prompt=generation_prompt,
            **self._special_tokens,
        ):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_RENDERED:
                raise ArgumentError(
                    f"a chat of more than {MAX_RENDERED} characters", "send fewer messages"
                )
        return "".join(pieces)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here it is plain text."""

    tags = {"generation"}  # noqa: RUF012  the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Namespace(Namespace):
    """Takes no attribute that begins with an underscore: none of Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # any keyword may be an attribute: "self" too
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no attribute {name!r}")


class _OutOfTime(Exception):
    pass


class _ProcessorTime:
    """Raises _OutOfTime in the block once it has used so many seconds of processor time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._running = False

    def __enter__(self) -> None:
        self._running = True
        signal.signal(signal.SIGVTALRM, self._over)
        signal.setitimer(signal.ITIMER_VIRTUAL, self._seconds)

    def __exit__(self, *_: object) -> None:
        self._running = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def _over(self, _number: int, _frame: FrameType | None) -> None:
        if self._running:  # else the signal came when the block was done
            raise _OutOfTime


def check_model(model: int) -> None:
    """ArgumentError unless there is such a model."""
    if model != 0:
        raise ArgumentError(f"there is no model {model}", "use one of `models`")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own, leaves <, >, & and ' as they are."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:_MOST_REASON]
