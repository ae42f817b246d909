"""What the scripted model says: rules read from TOML, matched against the tokens of a context.

    [[say]]
    after = "The capital of France is"
    text = " Paris."

    [otherwise]
    text = " I do not know."

A rule matches where a context ends with its `after` and the first j tokens of its `text`, for any
j; the token it says next is the one behind them, and an end token behind the last. The rule with
the most tokens said already wins, so that a text once begun is said to its end; then the longest
`after`, then the later rule. `after` is compared as text, in which control tokens have none.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from inferlet.abi import read_vocab_table
from msgspec import Struct
from tokenizers import Tokenizer

from .errors import LoadError
from .vocabulary import Vocabulary

BUILT_IN: Final = """\
[[say]]
after = "The capital of France is"
text = " Paris."

[otherwise]
text = " I am a scripted model: I say what my script tells me."
"""
_MAX_SCRIPT_BYTES: Final = 16 << 20


class Say(Struct, forbid_unknown_fields=True):
    """`text` is said after `after`."""

    after: str
    text: str


class Otherwise(Struct, forbid_unknown_fields=True):
    """Said where no rule matches."""

    text: str


class Script(Struct, forbid_unknown_fields=True):
    """A script file. Where no rule matches and there is no `otherwise`, nothing is scripted."""

    say: list[Say] = []
    otherwise: Otherwise | None = None


def read_script(path: Path | None) -> Script:
    """The script at `path`, or the built-in one. LoadError if it is not there or not a script."""
    if path is None:
        return parse_script(BUILT_IN, "the built-in script")
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_SCRIPT_BYTES + 1)
        if len(data) > _MAX_SCRIPT_BYTES:
            raise LoadError(f"the script {path} has over {_MAX_SCRIPT_BYTES} octets", "shorten it")
        return parse_script(data.decode(), f"the script {path}")
    except OSError as error:
        raise LoadError(
            f"the script {path} cannot be read: {error.strerror}",
            "check the path: --model scripted:PATH.toml",
        ) from error
    except UnicodeDecodeError as error:
        raise LoadError(f"the script {path} is not UTF-8: {error}", "save it as UTF-8") from error


def parse_script(text: str, called: str) -> Script:
    """The script in `text`. LoadError, which calls it `called`, says what is wrong with it."""
    try:
        script = msgspec.convert(tomllib.loads(text), Script)
    except (ValueError, RecursionError) as error:  # of TOML and of msgspec
        raise LoadError(
            f"{called} is wrong: {error}",
            "write tables [[say]] with `after` and `text`, and at most one [otherwise] with `text`",
        ) from error
    for say in script.say:
        if not say.after:
            raise LoadError(
                f"{called} has an empty `after`, which would match everywhere",
                "for what is said where nothing else matches, use [otherwise]",
            )
    return script


@dataclass(frozen=True, slots=True)
class _Rule:
    after: bytes  # its text, without that of control tokens
    tokens: list[int]  # what it says, the end token included
    ends: list[int]  # octets of the text of its first j tokens


class Rules:
    """A script in the tokens of one vocabulary."""

    def __init__(self, script: Script, vocabulary: Vocabulary, end_tokens: list[int]) -> None:
        """`end_tokens`: the first ends each text that does not end in one of them itself.
        LoadError if an `after` has no text."""
        pieces, special = read_vocab_table(vocabulary.table)
        self._texts = [b"" if s else piece for piece, s in zip(pieces, special, strict=True)]
        self._tokenizer = Tokenizer.from_str(vocabulary.tokenizer_json.decode())
        self._end_tokens = end_tokens
        self._says = [self._rule(say.after, say.text) for say in script.say]
        self._otherwise = self._rule("", script.otherwise.text) if script.otherwise else None
        for say, rule in zip(script.say, self._says, strict=True):
            if not rule.after:
                raise LoadError(
                    f"the script's `after` {say.after!r} consists of control tokens, which have "
                    "no text",
                    "write some of the text beside them",
                )

    def next_token(self, context: list[int]) -> int | None:
        """What is said after `context`, token ids in the order of their positions; None if that
        is not scripted."""
        text = self._text(context)
        best: tuple[int, int, int] | None = None
        for number, rule in enumerate(self._says):
            said = _said(rule, context, text)
            if said is not None and (best is None or (said, len(rule.after), number) > best):
                best = said, len(rule.after), number
        if best is not None:
            return self._token(self._says[best[2]], best[0])
        if self._otherwise is None:
            return None
        return self._token(self._otherwise, _said(self._otherwise, context, text) or 0)

    @staticmethod
    def _token(rule: _Rule, said: int) -> int:
        return rule.tokens[min(said, len(rule.tokens) - 1)]

    def _rule(self, after: str, text: str) -> _Rule:
        tokens = self._encode(text)
        if not tokens or tokens[-1] not in self._end_tokens:
            tokens.append(self._end_tokens[0])
        ends = [0]
        for token in tokens:
            ends.append(ends[-1] + len(self._texts[token]))
        return _Rule(self._text(self._encode(after)), tokens, ends)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _text(self, tokens: list[int]) -> bytes:
        """The texts of `tokens`; ids beyond the vocabulary are vectors and have none."""
        return b"".join([self._texts[t] for t in tokens if t < len(self._texts)])


def _said(rule: _Rule, context: list[int], text: bytes) -> int | None:
    """The most tokens of the rule's that `context`, whose text is `text`, ends with, behind its
    `after`; None if it does not match."""
    for said in range(min(len(rule.tokens), len(context)), -1, -1):
        if said and (context[-1] != rule.tokens[said - 1] or context[-said:] != rule.tokens[:said]):
            continue
        if text.endswith(rule.after, 0, len(text) - rule.ends[said]):
            return said
    return None
