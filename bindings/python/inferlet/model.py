"""A model as an inferlet sees it: what it is, its text, and where to begin with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .abi import MAX_TOKENIZE_BYTES, Chat, Tokenize
from .checks import text as check_text
from .checks import wrong_type
from .context import Context
from .errors import ArgumentError
from .future import Answer, Future, same
from .queue import Queue
from .runtime import Runtime, runtime
from .text import StreamDecoder


class Model:
    """One of the models that piehost serves (Pie, SOSP'25, section 4.1)."""

    def __init__(self, runtime: Runtime, index: int) -> None:
        info = runtime.startup.models[index]
        self.runtime = runtime
        self.index = index
        self.info = info  # all of it, as the start-up block has it
        self.name = info.name
        self.description = info.description
        self.traits = list(info.traits)
        self.architecture = info.architecture
        self.page_size = info.page_size
        self.vocab_size = info.vocab_size
        self.hidden_size = info.hidden_size
        self.max_context = info.max_context
        self.bos_token = info.bos_token
        self.eos_tokens = list(info.eos_tokens)
        self.chat_template = info.chat_template

    def __repr__(self) -> str:
        return f"<Model {self.name}>"

    @property
    def prompt_template(self) -> str | None:
        """The model's chat template in Jinja, None if it has none: see `chat`."""
        return self.chat_template

    def has_trait(self, trait: str) -> bool:
        """True if the model realises `trait` (Pie, SOSP'25, Table 1), such as "OutputEmbed"."""
        return trait in self.traits

    def queue(self) -> Queue:
        """create_queue: a new queue; as a context manager it is destroyed at the end."""
        return Queue(self)

    def context(self, prompt: str | Sequence[int] | None = None) -> Context:
        """A new context, filled with `prompt`. Raises what `Context.fill` raises."""
        return Context(self, prompt)

    def restore(self, name: str) -> Context:
        """A context that was saved as `name`. Raises what `Context.restore` raises."""
        return Context.restore(self, name)

    def tokenize(self, text: str, special: bool = True) -> Future[list[int]]:
        """Token ids of `text`; `special` adds the tokenizer's own begin and end tokens.

        For whole texts: tokens of two texts side by side are not the tokens of the joined text.
        ArgumentError if `text` has more than 32,768 octets.
        """
        check_text("the text", text, MAX_TOKENIZE_BYTES)
        connection = self.runtime.connection
        command = Tokenize(None, self.index, text, bool(special))
        return connection.ask(command, Answer(connection, same))

    def chat(
        self, messages: Sequence[Mapping[str, Any]], generation_prompt: bool = True
    ) -> Future[list[int]]:
        """Token ids of `messages`, each at least a `role` and a `content`, in the model's own chat
        template; `generation_prompt` begins the model's turn after them.

        ArgumentError if `messages` are no dicts of what JSON can say, or too long for a frame of
        64 KiB. The answer fails with TraitError if the model has no template, ArgumentError if the
        template refuses the messages.
        """
        valid = "a list of dicts with a role and a content"
        if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
            raise wrong_type("messages", messages, valid)
        given = []
        for message in messages:
            if not isinstance(message, Mapping):
                raise wrong_type("a message", message, valid)
            given.append(dict(message))
        connection = self.runtime.connection
        command = Chat(None, self.index, given, bool(generation_prompt))
        return connection.ask(command, Answer(connection, same))

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
