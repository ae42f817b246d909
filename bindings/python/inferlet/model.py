"""A model as an inferlet sees it: what it is, its text, and where to begin with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from .abi import MAX_TOKENIZE_BYTES, Tokenize
from .context import Context
from .errors import ArgumentError
from .future import Future
from .queue import Queue
from .runtime import Runtime, runtime
from .text import StreamDecoder


class Model:
    """One of the models that piehost serves (Pie, SOSP'25, section 4.1)."""

    def __init__(self, runtime: Runtime, index: int) -> None:
        info = runtime.startup.models[index]
        self.runtime = runtime
        self.index = index
        self.name = info.name
        self.description = info.description
        self.traits = list(info.traits)
        self.page_size = info.page_size
        self.vocab_size = info.vocab_size
        self.max_context = info.max_context
        self.bos_token = info.bos_token
        self.eos_tokens = list(info.eos_tokens)
        self.chat_template = info.chat_template

    def __repr__(self) -> str:
        return f"<Model {self.name}>"

    def queue(self) -> Queue:
        """create_queue: a new queue; as a context manager it is destroyed at the end."""
        return Queue(self)

    def context(self, prompt: str | Sequence[int] | None = None) -> Context:
        """A new context, filled with `prompt`. Raises what `Context.fill` raises."""
        return Context(self, prompt)

    def tokenize(self, text: str, special: bool = True) -> Future[list[int]]:
        """Token ids of `text`; `special` adds the tokenizer's own begin and end tokens.

        For whole texts: tokens of two texts side by side are not the tokens of the joined text.
        ArgumentError if `text` has more than 32,768 octets.
        """
        size = len(text.encode())
        if size > MAX_TOKENIZE_BYTES:
            raise ArgumentError(
                f"the text has {size} octets, tokenize takes {MAX_TOKENIZE_BYTES}",
                "shorten it, or tokenize it in parts",
            )
        connection = self.runtime.connection
        future = Future(connection, lambda value: cast("list[int]", value))
        return connection.ask(Tokenize(None, self.index, text, special), future)

    def detokenize(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`, a local lookup. Control tokens have none; octets that are no
        UTF-8 become U+FFFD. ArgumentError if an id is not in the vocabulary."""
        return self.runtime.vocabulary.detokenize(tokens)

    def get_vocabs(self) -> list[bytes]:
        """The octets of every token, by id; a token may hold part of a character."""
        vocabulary = self.runtime.vocabulary
        return [vocabulary[token] for token in range(len(vocabulary))]

    def stream_decoder(self) -> StreamDecoder:
        """Text of tokens as they come."""
        return StreamDecoder(self.runtime.vocabulary)


def available_models() -> list[Model]:
    """The models this host serves."""
    return [Model(runtime, index) for index in range(len(runtime.startup.models))]


def available_traits(model: Model | str) -> list[str]:
    """The traits that `model` (or the model of that name) realises (Pie, SOSP'25, Table 1).
    ArgumentError if there is no such model."""
    if isinstance(model, Model):
        return list(model.traits)
    for info in runtime.startup.models:
        if info.name == model:
            return list(info.traits)
    names = ", ".join(info.name for info in runtime.startup.models)
    raise ArgumentError(f"there is no model {model!r}", f"use one of: {names}")
