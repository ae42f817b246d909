"""The inferlet ABI, version 1: the one Python definition of every message.

`docs/abi.md` is the contract in words; this file is the same contract as types. The SDK encodes
with it, the controller decodes with it. It imports nothing of piehost. One page although it is
long, because a contract is looked up: nine tenths are a list of commands in the order of their ops.

A frame is one ZMTP message (RFC 23 traffic framing) whose body is a msgpack array of commands
(inferlet to controller) or answers (controller to inferlet). A command is a short array
``[op, request_id or nil, fields...]``. New fields go last and have defaults.
"""

from __future__ import annotations

import itertools
import struct
from typing import Annotated, Any, Final, TypeAlias

import msgspec
from msgspec import Meta, Struct

ABI_VERSION: Final = 1

MAX_FRAME_BYTES: Final = 65536  # body of one frame, both directions
MAX_COMMANDS_PER_FRAME: Final = 4096
MAX_MESSAGE_BYTES: Final = 60000  # payload of `send` and `receive`
MAX_TOKENIZE_BYTES: Final = 32768
MAX_STOP_TOKENS: Final = 64
MAX_READ_SPANS: Final = 1024  # spans in the `reads` of one `forward`
MAX_BIASES: Final = 1024  # tokens in the `bias` of one `sample`
MAX_TOPIC_BYTES: Final = 256  # also of the names of exports and the keys of the store
MAX_META_BYTES: Final = 60000  # what an export carries beside its pages
MAX_EXPORT_RANGES: Final = 1024  # page ranges of one export
MAX_URL_BYTES: Final = 8192
MAX_HTTP_HEADERS: Final = 64
MAX_SPAWN_ARGS: Final = 256
MAX_LISTED: Final = 256  # names in one answer of `store_list` or `list_exported`

SOCKET_FD: Final = 3  # connected stream socket, past the ZMTP handshake
RING_OUT_FD: Final = 4  # backend to inferlet, read-only here
RING_IN_FD: Final = 5  # inferlet to backend
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
PageRange: TypeAlias = tuple[Handle, U32, U32]  # (kv handle, first page, pages)
# a topic, the name of an export, a key of the store
Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=MAX_TOPIC_BYTES)]
Prefix: TypeAlias = Annotated[str, Meta(max_length=MAX_TOPIC_BYTES)]
Payload: TypeAlias = Annotated[bytes, Meta(max_length=MAX_MESSAGE_BYTES)]
Url: TypeAlias = Annotated[str, Meta(min_length=1, max_length=MAX_URL_BYTES)]
HttpHeaders: TypeAlias = Annotated[dict[str, str], Meta(max_length=MAX_HTTP_HEADERS)]


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
    """Answered with the token id, or nil if an earlier stop dropped it; with `logprobs` or a `k`,
    with `[token, log-probability, entries written to ring out]`. `lazy` answers may be
    held back, at most 16 answers and 0.4 s, so that a frame carries several. `mask` is where in
    ring in a bit for each token of the vocabulary lies, `offset` where in ring out the `k` most
    probable tokens go, as of `get_next_dist`."""

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
    mask: U32 | None = None
    bias: Annotated[list[tuple[U32, float]], Meta(max_length=MAX_BIASES)] = []
    history: Handle | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=1e6)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-1e6, le=1e6)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-1e6, le=1e6)] = 0.0
    logprobs: bool = False
    k: U32 = 0
    offset: U32 = 0


class Tokenize(Command, tag=20):
    """Answered with a list of token ids. `special` adds the tokenizer's own BOS/EOS."""

    model: U32
    text: Annotated[str, Meta(max_length=MAX_TOKENIZE_BYTES)]
    special: bool = True


class Quota(Command, tag=21):
    """Answered with a map of what is left, by the names of quotas."""


class Broadcast(Command, tag=22):
    """Answered with how many subscriptions got it. `job` keeps it within the sender's job."""

    topic: Name
    data: Payload
    job: bool = False


class Subscribe(Command, tag=23):
    subscription: Handle
    topic: Name
    job: bool = False


class Unsubscribe(Command, tag=24):
    subscription: Handle


class NextMessage(Command, tag=25):
    """Answered with `[data, id of the sender]` once there is a message."""

    subscription: Handle


class StoreGet(Command, tag=26):
    """Answered with the value, or nil."""

    key: Name


class StoreSet(Command, tag=27):
    key: Name
    value: Payload


class StoreDelete(Command, tag=28):
    """Answered with whether it was there."""

    key: Name


class StoreExists(Command, tag=29):
    key: Name


class StoreList(Command, tag=30):
    """Answered with the keys that begin with `prefix` and come after `after`, in order; at most
    256: the last one is the next call's `after`."""

    prefix: Prefix = ""
    after: Prefix = ""


class HttpGet(Command, tag=31):
    """Answered with `[status, headers]`; the body is read with `http_read`."""

    stream: Handle
    url: Url
    headers: HttpHeaders = {}


class HttpPost(Command, tag=32):
    """As `http_get`, with a body; `more` says that `http_write` sends the rest of it."""

    stream: Handle
    url: Url
    body: Payload = b""
    headers: HttpHeaders = {}
    more: bool = False


class HttpWrite(Command, tag=33):
    stream: Handle
    data: Payload
    more: bool = False


class HttpRead(Command, tag=34):
    """Answered with the next part of the body, of 1 to 60,000 octets; empty at its end."""

    stream: Handle


class HttpClose(Command, tag=35):
    stream: Handle


class Spawn(Command, tag=36):
    """Answered with the child's id once it runs. `program` is a name of `[children]` in
    inferlet.toml; empty for the caller's own program."""

    child: Handle
    program: Prefix = ""
    args: Annotated[list[str], Meta(max_length=MAX_SPAWN_ARGS)] = []


class SendChild(Command, tag=37):
    child: Handle
    data: Payload


class ReceiveChild(Command, tag=38):
    """Answered with the child's next message; `closed` when there will be none."""

    child: Handle


class CloseChild(Command, tag=39):
    """No more messages to the child: its `receive` is `closed` once it has read the others."""

    child: Handle


class WaitChild(Command, tag=40):
    """Answered with the child's exit code once it has ended (128 + n: signal n)."""

    child: Handle


class EndChild(Command, tag=41):
    """Ends the child if it runs, and frees the handle."""

    child: Handle


class ExportKvPage(Command, tag=42):
    """Shares whole pages under `name`. `lease` nil: until the exporter ends; else seconds after
    the latest export or import, whoever has ended."""

    queue: Handle
    name: Name
    pages: Annotated[list[PageRange], Meta(min_length=1, max_length=MAX_EXPORT_RANGES)]
    meta: Annotated[bytes, Meta(max_length=MAX_META_BYTES)] = b""
    lease: U32 | None = None


class UnexportKvPage(Command, tag=43):
    name: Name


class ImportKvPage(Command, tag=44):
    """A new handle for the pages of an export, shared. Answered with `[pages, meta]`."""

    queue: Handle
    kv: Handle
    name: Name


class ListExported(Command, tag=45):
    """Answered with `[name, pages, exporter's id, seconds left or nil]` of each; at most 256."""

    prefix: Prefix = ""
    after: Prefix = ""


class ReadEmb(Command, tag=46):
    """Writes f32 [length, hidden_size] into ring out at `offset`; answered with the length."""

    queue: Handle
    emb: Span
    offset: U32


class WriteEmb(Command, tag=47):
    """Fills embeds with f32 [length, hidden_size] from ring in at `offset`."""

    queue: Handle
    target: Span
    offset: U32
    positions: Position | list[Position] = 0


class AllocHistory(Command, tag=48):
    """Tokens that penalties look at; those of `prompt` count for the repetition penalty alone."""

    queue: Handle
    history: Handle
    prompt: list[TokenRef] = []


class ExtendHistory(Command, tag=49):
    queue: Handle
    history: Handle
    tokens: list[TokenRef]


class DeallocHistory(Command, tag=50):
    queue: Handle
    history: Handle


class Chat(Command, tag=51):
    """Token ids of `messages` in the model's chat template."""

    model: U32
    messages: Annotated[list[dict[str, Any]], Meta(max_length=1024)]
    generation_prompt: bool = True


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
    | Quota
    | Broadcast
    | Subscribe
    | Unsubscribe
    | NextMessage
    | StoreGet
    | StoreSet
    | StoreDelete
    | StoreExists
    | StoreList
    | HttpGet
    | HttpPost
    | HttpWrite
    | HttpRead
    | HttpClose
    | Spawn
    | SendChild
    | ReceiveChild
    | CloseChild
    | WaitChild
    | EndChild
    | ExportKvPage
    | UnexportKvPage
    | ImportKvPage
    | ListExported
    | ReadEmb
    | WriteEmb
    | AllocHistory
    | ExtendHistory
    | DeallocHistory
    | Chat
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
    ring_bytes: int  # ring out
    ring_in_bytes: int
    history: int  # tokens in histories
    export_pages: int  # pages that the user's exports hold
    children: int  # descendants alive at once, of the job's first inferlet
    subscriptions: int
    http_streams: int  # open at once
    store_bytes: int  # keys and values of the user


class Startup(Struct, kw_only=True):
    """The map in the start-up memfd (fd 6)."""

    abi: int
    version: str  # of piehost
    id: str
    user: str  # whose store, topics and exports it sees
    job: str  # the id of the inferlet that the client launched, or what it was launched with
    deadline: float | None  # when it is ended: seconds, Unix time
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
