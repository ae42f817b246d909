"""The inferlet ABI, version 1: the one Python definition of every message.

`docs/abi.md` is the contract in words; this file is the same contract as types. The SDK encodes
with it, the controller decodes with it. It imports nothing of piehost.

A frame is one ZMTP message (RFC 23 traffic framing) whose body is a msgpack array of commands
(inferlet to controller) or answers (controller to inferlet). A command is a short array
``[op, request_id or nil, fields...]``. New fields go last and have defaults.
"""

from __future__ import annotations

import itertools
import struct
from typing import Annotated, Final, TypeAlias

import msgspec
from msgspec import Meta, Struct

ABI_VERSION: Final = 1

MAX_FRAME_BYTES: Final = 65536  # body of one frame, both directions
MAX_COMMANDS_PER_FRAME: Final = 4096
MAX_MESSAGE_BYTES: Final = 60000  # payload of `send` and `receive`
MAX_TOKENIZE_BYTES: Final = 32768
MAX_STOP_TOKENS: Final = 64
MAX_READ_SPANS: Final = 1024  # spans in the `reads` of one `forward`

SOCKET_FD: Final = 3  # connected stream socket, past the ZMTP handshake
RING_OUT_FD: Final = 4  # backend to inferlet, read-only here
# fd 5 is kept for the ring in (inferlet to backend), which comes with `write_emb`
STARTUP_FD: Final = 6  # sealed memfd: one msgpack map, `Startup`
VOCAB_FD: Final = 7  # sealed memfd: the vocabulary table, `docs/abi.md` section 4

ANSWER_OK: Final = 0
ANSWER_ERROR: Final = 1

U32: TypeAlias = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
U64: TypeAlias = Annotated[int, Meta(ge=0)]  # msgpack itself ends at 2**64 - 1
Handle: TypeAlias = Annotated[int, Meta(ge=1, le=0xFFFFFFFF)]
Position: TypeAlias = Annotated[int, Meta(ge=0, le=0x7FFFFFFF)]
# a token id, or ~handle (bitwise not, so negative) of a late-bound token
TokenRef: TypeAlias = Annotated[int, Meta(ge=-0x100000000, le=0x7FFFFFFF)]
Span: TypeAlias = tuple[Handle, U32, U32]  # (handle, first, length), in slots or embeds
Index: TypeAlias = tuple[Handle, U32]  # (handle, index)


class Command(Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """A command. `req` is nil when no answer is wanted."""

    req: U32 | None


class Send(Command, tag=1):
    data: Annotated[bytes, Meta(max_length=MAX_MESSAGE_BYTES)]


class Receive(Command, tag=2):
    """Answered with the next message from the client, as bin."""


class CreateQueue(Command, tag=3):
    queue: Handle
    model: U32 = 0


class DestroyQueue(Command, tag=4):
    """Cancels what has not run and frees every page, embed and token made through the queue."""

    queue: Handle


class Synchronize(Command, tag=5):
    queue: Handle


class SetQueuePriority(Command, tag=6):
    queue: Handle
    priority: Annotated[int, Meta(ge=-8, le=7)]


class Cancel(Command, tag=7):
    queue: Handle


class AllocKvPage(Command, tag=8):
    queue: Handle
    kv: Handle
    pages: U32


class DeallocKvPage(Command, tag=9):
    """Frees `pages` pages from `first_page` on; nil means all that are left, and the handle."""

    queue: Handle
    kv: Handle
    first_page: U32 = 0
    pages: U32 | None = None


class ShareKvPage(Command, tag=10):
    """A new handle `kv` for `pages` whole pages of `source`, sharing them by reference count."""

    queue: Handle
    kv: Handle
    source: Handle
    first_page: U32
    pages: U32


class CopyKvPage(Command, tag=11):
    queue: Handle
    source: Span
    target: Span


class MaskKvPage(Command, tag=12):
    queue: Handle
    span: Span
    visible: bool


class AllocEmb(Command, tag=13):
    queue: Handle
    emb: Handle
    count: U32


class DeallocEmb(Command, tag=14):
    queue: Handle
    emb: Handle


class DeallocToken(Command, tag=15):
    queue: Handle
    token: Handle


class EmbedTxt(Command, tag=16):
    """Embeds `tokens` into `target`; `positions` is a list, or the first of consecutive ones."""

    queue: Handle
    target: Index
    tokens: list[TokenRef]
    positions: Position | list[Position] = 0


class Forward(Command, tag=17):
    """`mask`: one row an input, LSB first, each row padded to bytes; a row covers the read slots
    in order, then the inputs. `positions` nil means those of the embeds."""

    queue: Handle
    inputs: Span
    reads: Annotated[list[Span], Meta(max_length=MAX_READ_SPANS)]
    write: Span | None = None
    outputs: Span | None = None
    positions: list[Position] | None = None
    mask: bytes | None = None


class GetNextDist(Command, tag=18):
    """Writes k token ids (u32) then k probabilities (f32), most probable first, into the ring
    out at `offset`; answered with the number written (k, or the vocabulary if smaller)."""

    queue: Handle
    emb: Index
    k: U32
    offset: U32


class Sample(Command, tag=19):
    """Answered with the token id, or nil if an earlier stop dropped it. `lazy` answers may be
    held back, at most 16 answers and 0.4 s, so that a frame carries several."""

    queue: Handle
    emb: Index
    token: Handle
    temperature: Annotated[float, Meta(ge=0.0, le=1e6)] = 0.0
    top_k: U32 = 0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    seed: U64 | None = None
    stop: Annotated[list[U32], Meta(max_length=MAX_STOP_TOKENS)] = []
    lazy: bool = False


class Tokenize(Command, tag=20):
    """Answered with a list of token ids. `special` adds the tokenizer's own BOS/EOS."""

    model: U32
    text: Annotated[str, Meta(max_length=MAX_TOKENIZE_BYTES)]
    special: bool = True


AnyCommand: TypeAlias = (
    Send
    | Receive
    | CreateQueue
    | DestroyQueue
    | Synchronize
    | SetQueuePriority
    | Cancel
    | AllocKvPage
    | DeallocKvPage
    | ShareKvPage
    | CopyKvPage
    | MaskKvPage
    | AllocEmb
    | DeallocEmb
    | DeallocToken
    | EmbedTxt
    | Forward
    | GetNextDist
    | Sample
    | Tokenize
)
Frame: TypeAlias = Annotated[list[AnyCommand], Meta(max_length=MAX_COMMANDS_PER_FRAME)]


class ModelInfo(Struct, kw_only=True):
    """What an inferlet knows of a model. `traits` are the paper's (Table 1) that it realises."""

    name: str
    description: str
    traits: list[str]
    architecture: str
    page_size: int  # slots a KV page
    vocab_size: int
    hidden_size: int
    max_context: int  # positions 0 .. max_context - 1
    bos_token: int | None
    eos_tokens: list[int]
    chat_template: str | None


class Limits(Struct, kw_only=True):
    """Caps of this inferlet."""

    kv_pages: int
    embeds: int
    tokens: int  # late-bound token handles held at once
    commands: int  # queued, not yet run
    frame_bytes: int
    top_k: int
    ring_bytes: int


class Startup(Struct, kw_only=True):
    """The map in the start-up memfd (fd 6)."""

    abi: int
    id: str
    args: list[str]
    models: list[ModelInfo]
    limits: Limits


# --- framing: ZMTP 3.0 traffic (RFC 23): flags octet, size, body -------------------------------

_LONG = struct.Struct(">BQ")
FLAG_LONG: Final = 2


def frame_header(size: int) -> bytes:
    """The octets before a single-part message of `size` octets."""
    return bytes((0, size)) if size < 256 else _LONG.pack(FLAG_LONG, size)


VOCAB_MAGIC: Final = b"PIEV"
VOCAB_SPECIAL: Final = 1  # flag bit: a control token, no text


def build_vocab_table(pieces: list[bytes], special: list[bool]) -> bytes:
    """The vocabulary table of `docs/abi.md` section 4."""
    offsets = [0]
    for piece in pieces:
        offsets.append(offsets[-1] + len(piece))
    head = VOCAB_MAGIC + struct.pack("<II", 1, len(pieces))
    flags = bytes(VOCAB_SPECIAL if s else 0 for s in special)
    return head + struct.pack(f"<{len(offsets)}I", *offsets) + flags + b"".join(pieces)


def read_vocab_table(data: bytes | memoryview) -> tuple[list[bytes], list[bool]]:
    """(pieces, special) of a table that `build_vocab_table` made. ValueError if it is no table."""
    if bytes(data[:4]) != VOCAB_MAGIC:
        raise ValueError("not a vocabulary table: wrong magic")
    version, count = struct.unpack_from("<II", data, 4)
    if version != 1:
        raise ValueError(f"vocabulary table version {version}, this binding reads 1")
    offsets = struct.unpack_from(f"<{count + 1}I", data, 12)
    flags_at = 12 + 4 * (count + 1)
    text = bytes(data[flags_at + count :])
    special = [bool(f & VOCAB_SPECIAL) for f in bytes(data[flags_at : flags_at + count])]
    return [text[a:b] for a, b in itertools.pairwise(offsets)], special


encoder = msgspec.msgpack.Encoder()
