"""A tokenizer as inferlets get it: the octets of every token, and its JSON.

Two kinds of tokenizer are understood, which are nearly all of today's: byte-level BPE (every octet
is spelt as a printable character) and SentencePiece-like ones (a space is spelt U+2581, octets
without a piece are spelt <0xAB>). transformers is imported only where a folder's tokenizer has to
be found out: the scripted model does without it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from inferlet.abi import build_vocab_table
from tokenizers import Tokenizer

from .errors import LoadError

_BYTE_PIECE: Final = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE: Final = "\u2581"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    table: bytes  # `docs/abi.md` section 4
    tokenizer_json: bytes  # for tokenizers.Tokenizer.from_str
    bos_token: int | None
    eos_token: int | None
    special_tokens: dict[str, str]  # texts by name, "bos_token" and so on, for the chat template
    chat_template: str | None


def load_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """The tokenizer in `folder`, its table cut or padded to the model's `vocab_size`.

    LoadError if it cannot be read or spells its pieces in a way not understood.
    """
    from transformers import AutoTokenizer  # takes a second

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        backend = tokenizer.backend_tokenizer
    except Exception as error:  # transformers and tokenizers raise bare Exceptions here
        raise LoadError(
            f"the tokenizer of {folder.name} cannot be read: {_first_line(error)}",
            "save it again with transformers' fast tokenizer, which writes tokenizer.json",
        ) from error
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    texts = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    return make_vocabulary(backend, vocab_size, texts, template)


def make_vocabulary(
    tokenizer: Tokenizer,
    vocab_size: int,
    special_tokens: dict[str, str],
    chat_template: str | None,
) -> Vocabulary:
    """Of a tokenizer that is read already; its truncation and padding are turned off.
    `special_tokens`: texts by name; those called bos_token and eos_token are what the names say.

    LoadError if it spells its pieces in a way not understood.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    spec = json.loads(tokenizer.to_str())
    spell = _spelling(spec)
    pieces = [b""] * vocab_size
    special = [True] * vocab_size  # an id without a token has no text either
    for piece, token in tokenizer.get_vocab(with_added_tokens=False).items():
        if token < vocab_size:
            pieces[token], special[token] = spell(piece), False
    for added in spec["added_tokens"]:  # these are spelt as they are
        if added["id"] < vocab_size:
            control = added["special"]
            pieces[added["id"]] = b"" if control else added["content"].encode()
            special[added["id"]] = control
    return Vocabulary(
        table=build_vocab_table(pieces, special),
        tokenizer_json=tokenizer.to_str().encode(),
        bos_token=tokenizer.token_to_id(special_tokens.get("bos_token", "")),
        eos_token=tokenizer.token_to_id(special_tokens.get("eos_token", "")),
        special_tokens=special_tokens,
        chat_template=chat_template,
    )


def _spelling(spec: dict[str, Any]) -> Any:
    """The function from a piece to its octets that undoes how this tokenizer spells them."""
    decoder = spec.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        octets = {c: o for o, c in _byte_level_alphabet().items()}

        def byte_level(piece: str) -> bytes:
            return b"".join(bytes((octets[c],)) if c in octets else c.encode() for c in piece)

        return byte_level
    replaces_space = any(
        step.get("type") == "Replace" and step["pattern"].get("String") == _SPACE for step in steps
    )
    if "Metaspace" in kinds or replaces_space:
        fallback = "ByteFallback" in kinds

        def metaspace(piece: str) -> bytes:
            if fallback and (octet := _BYTE_PIECE.fullmatch(piece)):
                return bytes((int(octet[1], 16),))
            return piece.replace(_SPACE, " ").encode()

        return metaspace
    raise LoadError(
        f"its tokenizer decodes by {', '.join(sorted(str(k) for k in kinds))}, which cannot be "
        "turned into a vocabulary table",
        "use a model with a byte-level BPE or SentencePiece tokenizer",
    )


def _byte_level_alphabet() -> dict[int, str]:
    """Octet -> the character that byte-level BPE (GPT-2's) spells it with."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [octet for octet in range(256) if octet not in set(printable)]
    return {o: chr(o) for o in printable} | {o: chr(256 + i) for i, o in enumerate(others)}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
