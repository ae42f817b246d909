"""Writes the golden vectors of the inferlet ABI: byte-exact examples that every binding replays.

    python bindings/vectors/generate.py [folder]

It knows `docs/abi.md` and nothing of any binding: frames are built from plain lists, so that a
mistake in a binding's types shows as a difference. The files are JSON lists of objects:

- `commands.json`, `answers.json`: `name`, `direction` (`to_controller` or `to_inferlet`),
  `frame_hex` (the whole ZMTP message, header included) and `commands` or `answers`: the body as
  JSON, where msgpack bin is `{"hex": "..."}`. A binding encodes exactly these octets: smallest
  msgpack forms, floats always float64, trailing optional fields always written.
- `short_commands.json`: commands with trailing optional fields left out. No binding of ours writes
  them; a controller reads them as the full `commands` beside them.
- `bad_frames.json`: `name`, `direction`, `frame_hex` and `why`: each ends the inferlet.
- `vocab_table.json`: `table_hex`, `pieces` (hex of each token's text), `special` (bool each) and
  `detokenize`: pairs of `tokens` and `text_hex`.
- `startup.json`: `block_hex` and `startup`, the map in it.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import msgspec

Vector = dict[str, Any]
U32_MAX = 2**32 - 1
ANY_REQUEST = 7


def packed(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


def as_json(value: object) -> object:
    """`value` with bytes as `{"hex": ...}`."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, list):
        return [as_json(v) for v in value]
    return value


def framed(body: bytes) -> bytes:
    """One ZMTP message: flags, size (one octet, or eight), body."""
    if len(body) < 256:
        return struct.pack("BB", 0, len(body)) + body
    return struct.pack(">BQ", 2, len(body)) + body


def commands(name: str, *items: list[Any]) -> Vector:
    return {
        "name": name,
        "direction": "to_controller",
        "frame_hex": framed(packed(list(items))).hex(),
        "commands": as_json(list(items)),
    }


def answers(name: str, *items: list[Any]) -> Vector:
    return {
        "name": name,
        "direction": "to_inferlet",
        "frame_hex": framed(packed(list(items))).hex(),
        "answers": as_json(list(items)),
    }


def short(name: str, sent: list[Any], full: list[Any]) -> Vector:
    return {**commands(name, full), "frame_hex": framed(packed([sent])).hex()}


def bad(name: str, why: str, frame: bytes) -> Vector:
    return {"name": name, "direction": "to_controller", "frame_hex": frame.hex(), "why": why}


def bad_body(name: str, why: str, *items: object) -> Vector:
    """A whole frame whose body is the array of `items`."""
    return bad(name, why, framed(packed(list(items))))


def all_commands() -> list[Vector]:
    decode_loop = [
        command
        for i in range(8)
        for command in (
            [16, None, 1, [1, 9], [-2], 100 + i],
            [17, None, 1, [1, 9, 1], [[1, 0, 100 + i]], [1, 100 + i, 1], [1, 9, 1], None, None],
            [19, 200 + i, 1, [1, 9], 1, 0.0, 0, 1.0, 0.0, None, [2], True],
        )
    ]
    return [
        commands("nothing"),
        commands("send", [1, None, b"hello"]),
        commands("send empty, request 0", [1, 0, b""]),
        commands("send bin 16", [1, 1, bytes(range(256)) * 2]),
        commands("send the most", [1, U32_MAX, b"\xff" * 60000]),
        commands("receive", [2, 65536]),
        commands("create_queue, defaults", [3, None, 1, 0]),
        commands("create_queue, every field", [3, 1, U32_MAX, 2]),
        commands("destroy_queue", [4, None, 1]),
        commands("synchronize", [5, 127, 1]),
        commands("set_queue_priority, lowest", [6, None, 1, -8]),
        commands("set_queue_priority, highest", [6, 128, 1, 7]),
        commands("cancel", [7, 255, 1]),
        commands("alloc_kvpage", [8, None, 1, 1, 16]),
        commands("alloc_kvpage, wide numbers", [8, 256, 127, 128, 65536]),
        commands("dealloc_kvpage, defaults", [9, None, 1, 1, 0, None]),
        commands("dealloc_kvpage, every field", [9, 65535, 1, 1, 3, 2]),
        commands("share_kvpage", [10, None, 1, 2, 1, 0, 4]),
        commands("copy_kvpage", [11, None, 1, [1, 64, 5], [2, 0, 5]]),
        commands("mask_kvpage, hide", [12, None, 1, [1, 4, 300], False]),
        commands("mask_kvpage, show", [12, 5, 1, [1, 4, 300], True]),
        commands("alloc_emb", [13, None, 1, 1, 512]),
        commands("dealloc_emb", [14, None, 1, 1]),
        commands("dealloc_token", [15, None, 1, U32_MAX]),
        commands("embed_txt, defaults", [16, None, 1, [1, 0], [5], 0]),
        commands("embed_txt, no tokens", [16, None, 1, [1, 0], [], 0]),
        commands("embed_txt, first position", [16, None, 1, [1, 3], [0, 255, 256, 65535], 17]),
        commands("embed_txt, every position", [16, 9, 1, [1, 3], [5, 6, 7], [9, 0, 2**31 - 1]]),
        commands("embed_txt, late tokens", [16, None, 1, [1, 0], [-2, 5, -33, -129, -32769], 3]),
        commands("embed_txt, widest late token", [16, None, 1, [1, 0], [-(2**32), 2**31 - 1], 0]),
        commands("forward, defaults", [17, None, 1, [1, 0, 4], [], None, None, None, None]),
        commands(
            "forward, a decode step",
            [17, None, 1, [1, 0, 1], [[1, 0, 9]], [1, 9, 1], [1, 0, 1], None, None],
        ),
        commands(
            "forward, every field",
            [17, 10, 1, [1, 0, 2], [[1, 0, 3], [2, 8, 1]], [1, 3, 2], [3, 5, 1], [7, 9], b"\x1f/"],
        ),
        commands("get_next_dist", [18, 11, 1, [1, 3], 256, 4096]),
        commands("sample, defaults", [19, None, 1, [1, 0], 1, 0.0, 0, 1.0, 0.0, None, [], False]),
        commands(
            "sample, every field",
            [19, 12, 1, [1, 0], 5, 0.75, 40, 0.875, 0.0625, 2**64 - 1, [2, 300], True],
        ),
        commands("sample, seed 0", [19, 12, 1, [1, 0], 5, 1.0, 0, 1.0, 0.0, 0, [], False]),
        commands("tokenize, defaults", [20, 13, 0, "The capital of France is", True]),
        commands("tokenize, every field", [20, 14, 1, "h\u00e9llo \u4e16\u754c \U0001f600", False]),
        commands("tokenize, str 16", [20, 15, 0, "word " * 100, True]),
        commands("a frame of 255 octets", [1, None, b"x" * 249]),
        commands("a frame of 256 octets", [1, None, b"x" * 250]),
        commands("a long frame: eight decode steps with lazy samples", *decode_loop),
    ]


ERRORS = [
    (1, "bad_frame"),
    (2, "bad_handle"),
    (3, "bad_span"),
    (4, "bad_position"),
    (5, "bad_argument"),
    (6, "bad_mask"),
    (7, "over_quota"),
    (8, "shared_page"),
    (9, "unwritten"),
    (10, "cancelled"),
    (11, "out_of_memory"),
    (12, "backend"),
    (13, "missing_trait"),
    (14, "closed"),
]


def all_answers() -> list[Vector]:
    return [
        answers("nothing"),
        answers("nil", [0, 0, None]),
        answers("a token", [0, 127, 5]),
        answers("a large token", [0, 128, 128000]),
        answers("a dropped sample", [0, U32_MAX, None]),
        answers("entries of a distribution", [0, 256, 256]),
        answers("a message", [0, 65535, b"hi"]),
        answers("an empty message", [0, 65536, b""]),
        answers("tokens", [0, 1, [1, 2, 300, 70000]]),
        answers("no tokens", [0, 1, []]),
        answers("a long frame: many tokens", [0, 1, list(range(1000, 1400))]),
        answers("a long frame: a message", [0, 1, bytes(range(256)) * 3]),
        answers("eight lazy tokens", *[[0, 200 + i, 11 + i] for i in range(8)]),
        answers("a stop: the rest was dropped", [0, 1, 2], [0, 2, None], [0, 3, None]),
        answers("out of order, with an error", [0, 9, 4], [1, 3, 3, "no", "yes"], [0, 2, None]),
        *[
            answers(f"error {name}", [1, ANY_REQUEST, code, f"{name}: what and why", "what to try"])
            for code, name in ERRORS
        ],
        answers("an error without a hint", [1, ANY_REQUEST, 12, "the step failed", ""]),
        answers("a long error", [1, ANY_REQUEST, 5, "k is 9999 " * 20, "\u00e9 " * 20]),
    ]


def all_short() -> list[Vector]:
    return [
        short("create_queue", [3, 1, 1], [3, 1, 1, 0]),
        short("dealloc_kvpage", [9, 1, 1, 1], [9, 1, 1, 1, 0, None]),
        short("dealloc_kvpage, one field", [9, 1, 1, 1, 2], [9, 1, 1, 1, 2, None]),
        short("embed_txt", [16, 1, 1, [1, 0], [5]], [16, 1, 1, [1, 0], [5], 0]),
        short("forward", [17, 1, 1, [1, 0, 4], []], [17, 1, 1, [1, 0, 4], [], *[None] * 4]),
        short(
            "sample",
            [19, 1, 1, [1, 0], 1],
            [19, 1, 1, [1, 0], 1, 0.0, 0, 1.0, 0.0, None, [], False],
        ),
        short(
            "sample, three fields",
            [19, 1, 1, [1, 0], 1, 0.5, 3, 0.5],
            [19, 1, 1, [1, 0], 1, 0.5, 3, 0.5, 0.0, None, [], False],
        ),
        short("tokenize", [20, 1, 0, "x"], [20, 1, 0, "x", True]),
    ]


def all_bad() -> list[Vector]:
    sample = [19, 1, 1, [1, 0], 1, 0.0, 0, 1.0, 0.0, None, [], False]

    def sample_with(field: int, value: object) -> list[object]:
        return [*sample[:field], value, *sample[field + 1 :]]

    whole = packed([[5, 1, 1]])
    return [
        bad("the more bit", "flag 1: a message of several parts", b"\x01\x01\x90"),
        bad("a command frame", "flag 4: ZMTP commands ended with the handshake", b"\x04\x01\x90"),
        bad("a reserved flag", "flag 8 is reserved", b"\x08\x01\x90"),
        bad("too long", "a body of 65,537 octets", struct.pack(">BQ", 2, 65537)),
        bad("endless", "a body of 2**64 - 1 octets", struct.pack(">BQ", 2, 2**64 - 1)),
        bad("no body", "not a msgpack array", framed(b"")),
        bad("truncated", "the array ends before its last item", framed(whole[:-1])),
        bad("trailing octets", "an octet after the array", framed(whole + b"\xc0")),
        bad("two arrays", "a second array after the first", framed(whole + whole)),
        bad("reserved msgpack", "0xc1 is never used", framed(b"\x91\xc1")),
        bad("not an array", "a map", framed(packed({}))),
        bad("a bare command", "a command that is not in an array", framed(packed([5, 1, 1]))),
        bad_body("nil command", "a command is an array", None),
        bad_body("empty command", "a command has an op and a request id", []),
        bad_body("no request id", "a command has an op and a request id", [2]),
        bad_body("op 0", "unknown op", [0, None]),
        bad_body("op 21", "unknown op", [21, None]),
        bad_body("op -1", "unknown op", [-1, None]),
        bad_body("op a string", "an op is a number", ["send", None, b"x"]),
        bad_body("the second command wrong", "unknown op", [5, 1, 1], [99, None]),
        bad_body("negative request id", "below 0", [5, -1, 1]),
        bad_body("request id 2**32", "above 2**32 - 1", [5, 2**32, 1]),
        bad_body("request id a string", "a request id is a number or nil", [5, "1", 1]),
        bad_body("request id a float", "a request id is a number or nil", [5, 1.5, 1]),
        bad_body("too many fields", "synchronize has one field", [5, 1, 1, 0]),
        bad_body("too many fields with defaults", "sample has ten fields", [*sample, None]),
        bad_body("too few fields", "copy_kvpage has three fields", [11, 1, 1, [1, 0, 1]]),
        bad_body("send a str", "the data is bin", [1, 1, "hello"]),
        bad_body("send too much", "60,001 octets", [1, 1, b"x" * 60001]),
        bad_body("handle 0", "handles begin at 1", [3, 1, 0, 0]),
        bad_body("handle 2**32", "above 2**32 - 1", [3, 1, 2**32, 0]),
        bad_body("handle negative", "below 1", [3, 1, -1, 0]),
        bad_body("handle true", "a handle is a number", [5, 1, True]),
        bad_body("handle nil", "a handle is a number", [5, 1, None]),
        bad_body("model negative", "below 0", [3, 1, 1, -1]),
        bad_body("priority -9", "below -8", [6, 1, 1, -9]),
        bad_body("priority 8", "above 7", [6, 1, 1, 8]),
        bad_body("span of two", "a span is handle, first, length", [12, 1, 1, [1, 0], True]),
        bad_body("span of four", "a span is handle, first, length", [12, 1, 1, [1, 0, 1, 1], True]),
        bad_body("span length 2**32", "above 2**32 - 1", [12, 1, 1, [1, 0, 2**32], True]),
        bad_body("visible a number", "visible is a bool", [12, 1, 1, [1, 0, 1], 1]),
        bad_body("tokens nil", "tokens is an array", [16, 1, 1, [1, 0], None, 0]),
        bad_body("tokens a map", "tokens is an array", [16, 1, 1, [1, 0], {}, 0]),
        bad_body("a float token", "a token ref is a number", [16, 1, 1, [1, 0], [1.5], 0]),
        bad_body("token 2**31", "above 2**31 - 1", [16, 1, 1, [1, 0], [2**31], 0]),
        bad_body("late token too low", "below -(2**32)", [16, 1, 1, [1, 0], [-(2**32) - 1], 0]),
        bad_body("position -1", "below 0", [16, 1, 1, [1, 0], [5], -1]),
        bad_body("position 2**31", "above 2**31 - 1", [16, 1, 1, [1, 0], [5], [2**31]]),
        bad_body("position nil", "a position is a number", [16, 1, 1, [1, 0], [5], None]),
        bad_body("reads nil", "reads is an array", [17, 1, 1, [1, 0, 1], None]),
        bad_body("too many reads", "1,025 spans", [17, 1, 1, [1, 0, 1], [[1, 0, 1]] * 1025]),
        bad_body("mask a str", "a mask is bin", [17, 1, 1, [1, 0, 1], [], None, None, None, "x"]),
        bad_body("k a float", "k is a number", [18, 1, 1, [1, 0], 1.5, 0]),
        bad_body("offset negative", "below 0", [18, 1, 1, [1, 0], 1, -4]),
        bad_body("temperature negative", "below 0", sample_with(5, -0.5)),
        bad_body("temperature infinite", "above a million", sample_with(5, float("inf"))),
        bad_body("temperature NaN", "not a number", sample_with(5, float("nan"))),
        bad_body("top_p 0", "not above 0", sample_with(7, 0.0)),
        bad_body("top_p 1.5", "above 1", sample_with(7, 1.5)),
        bad_body("min_p -0.1", "below 0", sample_with(8, -0.1)),
        bad_body("seed negative", "below 0", sample_with(9, -1)),
        bad_body("65 stop tokens", "at most 64", sample_with(10, list(range(65)))),
        bad_body("lazy nil", "lazy is a bool", sample_with(11, None)),
        bad_body("text a bin", "text is str", [20, 1, 0, b"x", True]),
        bad("text not UTF-8", "str holds UTF-8", framed(b"\x91\x95\x14\x01\x00\xa1\xff\xc3")),
        bad_body("text too long", "32,769 characters", [20, 1, 0, "x" * 32769, True]),
        bad_body("too many commands", "4,097 commands", *[[2, None]] * 4097),
        bad("promised commands", "an array of 2**32 - 1 items", framed(b"\xdd\xff\xff\xff\xff")),
        bad("nesting bomb", "20,000 arrays in each other", framed(b"\x91" * 20000)),
        bad(
            "nesting bomb in a field",
            "arrays where a number is due",
            framed(b"\x91\x96\x10\xc0\x01\x92\x01\x00" + b"\x91" * 20000),
        ),
        bad(
            "map bomb",
            "20,000 empty maps",
            framed(b"\xdc" + struct.pack(">H", 20000) + b"\x80" * 20000),
        ),
    ]


def vocab_tables() -> list[Vector]:
    def table(name: str, tokens: list[tuple[bytes, bool]], *texts: list[int]) -> Vector:
        ends = [0]
        for piece, _ in tokens:
            ends.append(ends[-1] + len(piece))
        octets = (
            b"PIEV"
            + struct.pack("<II", 1, len(tokens))
            + struct.pack(f"<{len(ends)}I", *ends)
            + bytes(int(special) for _, special in tokens)
            + b"".join(piece for piece, _ in tokens)
        )
        return {
            "name": name,
            "table_hex": octets.hex(),
            "pieces": [piece.hex() for piece, _ in tokens],
            "special": [special for _, special in tokens],
            "detokenize": [
                {
                    "tokens": ids,
                    "text_hex": b"".join(tokens[i][0] for i in ids if not tokens[i][1]).hex(),
                }
                for ids in texts
            ],
        }

    euro = "\u20ac".encode()
    return [
        table("empty", [], []),
        table("one", [(b"a", False)], [0, 0]),
        table(
            "words, control tokens and parts of a character",
            [
                *[(b"<s>", True), (b"", True), (b"</s>", True), (b" Paris", False), (b"", False)],
                *[(euro[:1], False), (euro[1:], False), (b"\xff", False), (b"\n", False)],
            ],
            [],
            [0, 3, 8, 2],
            [5, 6],
            [6, 5, 7, 4],
        ),
        table("300 tokens", [(b"t%d" % i, i == 299) for i in range(300)], [0, 255, 256, 299]),
    ]


def startup_blocks() -> list[Vector]:
    def block(name: str, startup: dict[str, Any]) -> Vector:
        return {"name": name, "block_hex": packed(startup).hex(), "startup": startup}

    limits = {
        "kv_pages": 1024,
        "embeds": 4096,
        "tokens": 1024,
        "commands": 16384,
        "frame_bytes": 65536,
        "top_k": 1024,
        "ring_bytes": 1 << 20,
    }
    model = {
        "name": "default",
        "description": "a small model",
        "traits": ["allocate", "forward", "input_text", "tokenize", "output_text"],
        "architecture": "LlamaForCausalLM",
        "page_size": 16,
        "vocab_size": 4096,
        "hidden_size": 256,
        "max_context": 2048,
        "bos_token": 1,
        "eos_tokens": [2],
        "chat_template": "{{ messages }}",
    }
    second = {
        **model,
        "name": "other",
        "page_size": 8,
        "bos_token": None,
        "eos_tokens": [2, 128009],
        "chat_template": None,
    }
    plain = {"abi": 1, "id": "a1b2", "args": [], "models": [model], "limits": limits}
    args = ["--prompt", "Caf\u00e9 \u4e16\u754c", "", "x" * 300]
    return [
        block("no arguments", plain),
        block("arguments, two models", {**plain, "args": args, "models": [model, second]}),
        block("no model", {**plain, "models": []}),
        block("unknown keys", {**plain, "later": {"x": [1, 2]}, "limits": {**limits, "new": 1}}),
    ]


def all_vectors() -> dict[str, list[Vector]]:
    """File name to its vectors."""
    return {
        "commands.json": all_commands(),
        "short_commands.json": all_short(),
        "answers.json": all_answers(),
        "bad_frames.json": all_bad(),
        "vocab_table.json": vocab_tables(),
        "startup.json": startup_blocks(),
    }


def as_text(vectors: list[Vector]) -> str:
    """One vector a line, so that a change shows as the line it changes."""
    return "[\n" + ",\n".join(json.dumps(v) for v in vectors) + "\n]\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for file, vectors in all_vectors().items():
        (folder / file).write_text(as_text(vectors))
