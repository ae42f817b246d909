"""Attacks on the connection: what a hostile program writes to descriptor 3 (docs/abi.md)."""

from __future__ import annotations

import math
from typing import Any, Final

import msgspec
from inferlet import abi

from .cases import Case, codes, one_error, rounds

_encode = msgspec.msgpack.encode
BAD: Final = "ended: bad_frame"
_U32: Final = 0xFFFFFFFF


def x(octets: bytes) -> str:
    return f"x:{octets.hex()}"


def framed(body: bytes) -> bytes:
    return abi.frame_header(len(body)) + body


def frame(*commands: Any) -> str:
    """A frame of commands, or of whatever else is in their place."""
    return x(framed(_encode(list(commands))))


def body(octets: bytes) -> str:
    return x(framed(octets))


def hexed(*commands: Any) -> str:
    return framed(_encode(list(commands))).hex()


def _many(start: bytes, octet: str) -> tuple[str, str]:
    """The longest frame there may be: `start`, how many, and as many of one octet."""
    count = abi.MAX_FRAME_BYTES - len(start) - 4
    head = abi.frame_header(abi.MAX_FRAME_BYTES) + start + count.to_bytes(4, "big")
    return x(head), f"r:{count}:{octet}"


def _deep(octet: str) -> tuple[str, str]:
    """The longest frame there may be, a chat: there anything may be in a message, at any depth."""
    start = b"\x91\x94\x33\1\0\x91\x81\xa1a"
    count = abi.MAX_FRAME_BYTES - len(start)
    return x(abi.frame_header(abi.MAX_FRAME_BYTES) + start), f"r:{count}:{octet}"


QUEUE = abi.CreateQueue(None, 1)
# a right frame of many kinds of values
RIGHT = _encode(
    [
        QUEUE,
        abi.AllocKvPage(None, 1, 7, 2),
        abi.AllocEmb(None, 1, 7, 3),
        abi.EmbedTxt(None, 1, (7, 0), [5, 6, 300], [0, 1, 2]),
        abi.Forward(None, 1, (7, 0, 3), [(7, 0, 3)], (7, 0, 3), (7, 0, 3)),
        abi.Sample(2, 1, (7, 2), 9, temperature=0.5, seed=1, bias=[(3, 1.0)]),
        abi.Tokenize(3, 0, "text"),
    ]
)
# what reads ring in at its start, each time anew: how many octets change, and frames of one answer
MASKED = (
    65536,
    hexed(
        QUEUE,
        abi.AllocEmb(None, 1, 7, 2),
        abi.EmbedTxt(None, 1, (7, 0), [5], 0),
        abi.Forward(None, 1, (7, 0, 1), [], None, (7, 1, 1)),
        *[abi.Sample(None, 1, (7, 1), 9, mask=offset) for offset in (0, 4096)],
        abi.Synchronize(1, 1),
    ),
    hexed(abi.DestroyQueue(1, 1)),
)
VECTORS = (
    4,  # the first number: the others are right
    hexed(
        QUEUE,
        abi.AllocEmb(None, 1, 7, 2),
        abi.WriteEmb(None, 1, (7, 0, 1), 0, 0),
        abi.ReadEmb(None, 1, (7, 0, 1), 0),
        abi.Forward(None, 1, (7, 0, 1), [], None, (7, 1, 1)),
        abi.Sample(None, 1, (7, 1), 9),
        abi.Synchronize(1, 1),
    ),
    hexed(abi.DestroyQueue(1, 1)),
)


# the suite makes these; tests/test_controller_octets.py makes many more, without a host
_QUICK = {
    "several parts",
    "a command frame",
    "a frame of 65,537 octets",
    "a length of 4 GiB",
    "octets after the array",
    "a promise of 4 GiB",
}


def _wrong(name: str, *variants: tuple[object, ...]) -> Case:
    ends = tuple((*words, "e", "s") for words in variants)
    return Case(name, "P6", BAD, "octets", variants=ends, quick=name in _QUICK)


_SEND: Final = ("x:9301c0c57ffa", "r:32762:00")

FRAMES = [
    _wrong("several parts", (x(b"\1\1\x90"),)),
    _wrong("several parts without end", ("r:1000000:010190",)),
    _wrong("a command frame", (x(b"\4\1\x90"),), (x(b"\6" + (1).to_bytes(8, "big") + b"\x90"),)),
    _wrong("reserved flags", *((x(bytes([flags, 1, 0x90])),) for flags in (8, 0x10, 0x80, 0xFF))),
    _wrong(
        "an identity of its own (ZMTP greeting, READY)",
        (x(b"\xff" + bytes(8) + b"\x7f\3\0NULL" + bytes(48)),),
        (x(b"\4\x22\5READY\x08Identity\0\0\0\4host"),),
    ),
    # two commands to send 32,762 octets: right but for the size
    _wrong(
        "a frame of 65,537 octets",
        (x(b"\2" + (65537).to_bytes(8, "big") + b"\x92"), *_SEND, *_SEND),
    ),
    _wrong("a length of 4 GiB", (x(b"\2" + (1 << 32).to_bytes(8, "big")),)),
    _wrong("a length of 2**64 - 1", (x(b"\2" + b"\xff" * 8),)),
    _wrong("a length of 2**63", (x(b"\2" + (1 << 63).to_bytes(8, "big")),)),
    _wrong("no body", (x(b"\0\0"),), (x(b"\2" + bytes(8)),)),
    _wrong("not an array", (body(b"\x80"),), (body(b"\xc0"),), (body(b"\5"),), (body(b"\xa1x"),)),
    _wrong("octets after the array", (body(b"\x90\xc0"),), (body(RIGHT + b"\x90"),)),
    _wrong("more commands than a frame may have", (frame(*[[21, None]] * 4097),)),
    _wrong("an unknown op", (frame([0, 1]),), (frame([99, 1]),), (frame([-1, 1]),)),
    _wrong("an op that is no number", (frame(["send", 1, b"x"]),), (frame([[], 1]),)),
    _wrong("a command that is none", (frame(None),), (frame({}),), (frame([]),), (frame(5),)),
    _wrong("a request id out of range", (frame([21, -1]),), (frame([21, _U32 + 1]),)),
    _wrong("a request id of another type", (frame([21, "1"]),), (frame([21, 1.5]),)),
    _wrong("a field too many", (frame([21, 1, 2]),), (frame([3, 1, 1, 0, 0]),)),
    _wrong("a field too few", (frame([1, 1]),), (frame([8, 1, 1, 7]),)),
    _wrong("a field of another type", (frame([1, 1, "text"]),), (frame([8, 1, 1, 7, "2"]),)),
    _wrong("a field out of range", (frame([3, 1, 0]),), (frame([3, 1, _U32 + 1]),)),
    _wrong("a number of 65 bits and more", (frame([3, 1, (1 << 64) - 1]),), (frame([3, 1, -5]),)),
    _wrong(
        "numbers that are not finite",
        *((frame([19, 1, 1, [7, 0], 9, value]),) for value in (math.nan, math.inf, -math.inf)),
    ),
    _wrong("bad UTF-8", (body(b"\x91\x94\x14\1\0\xa2\xff\xfe"),)),
    _wrong("a surrogate in UTF-8", (body(b"\x91\x94\x14\1\0\xa3\xed\xa0\x80"),)),
    _wrong("an extension type", (body(b"\x91\x94\x14\1\0\xd4\1\0"),), (body(b"\xc7\0\1"),)),
    _wrong("an octet msgpack never uses", (body(b"\xc1"),), (body(b"\x91\x94\x14\1\0\xc1"),)),
    _wrong(
        "nesting as deep as a frame", ("f:65536:91",), ("f:65536:81",), _deep("91"), _deep("81")
    ),
    _wrong("nesting 10**6 deep", ("f:1000000:91",)),
    _wrong(
        "a promise of 4 GiB",
        *(
            (body(b"\x91\x94\x14\1\0" + bytes([kind]) + b"\xff" * 4),)
            for kind in (0xDB, 0xC6, 0xDD, 0xDF, 0xC9)
        ),
        (body(b"\xdd" + b"\xff" * 4),),
    ),
    _wrong("64 KiB of empty maps", *(_many(b"\xdd", octet) for octet in ("80", "90", "c0", "a0"))),
    _wrong("64 KiB of empty arrays among tokens", _many(b"\x91\x95\x10\1\1\x92\7\0\xdd", "90")),
]
# every prefix of a right frame's body, under the length that it then has
CUT = _wrong(
    "a right frame cut at each octet",
    *((body(RIGHT[:at]),) for at in range(len(RIGHT))),
)
# what comes only in part harms nobody: the end of the program is the end of it
PARTIAL = Case(
    "every part of a right frame, then the end",
    "P6",
    "says: ",
    "octets",
    variants=tuple((x(framed(RIGHT)[:at]),) for at in range(1, len(framed(RIGHT)), 4)),
)


def _asked(name: str, promise: str, expected: str, *commands: Any, judge: Any = codes) -> Case:
    """Commands whose answers are judged: one frame each, as they may end a queue."""
    words: list[object] = [frame(QUEUE)]
    for command in commands:
        words.append(frame(*command) if isinstance(command, list) else frame(command))
        words.append("g")
    return Case(name, promise, expected, "octets", tuple(words), judge=judge, quick=True)


def _on_kv(number: int, request: int) -> list[Any]:
    """Everything that takes a kv handle."""
    return [
        abi.DeallocKvPage(request, 1, number, 0, 1),
        abi.ShareKvPage(request, 1, 999, number, 0, 1),
        abi.CopyKvPage(request, 1, (number, 0, 1), (number, 0, 1)),
        abi.MaskKvPage(request, 1, (number, 0, 1), True),
        abi.ExportKvPage(request, 1, "name", [(number, 0, 1)]),
    ]


_STALE: Final = 50
_KV = {"stale": _STALE, "of a sibling": 1, "forged": 0x7FFFFFFF, "of the highest number": _U32}
HANDLES = [
    *(
        _asked(
            f"{type(command).__name__}: {', '.join(_KV)} are one error",
            "P7",
            f"answered: {len(_KV)} times the same 2",
            [abi.AllocKvPage(5, 1, _STALE, 1), abi.DeallocKvPage(None, 1, _STALE)],
            *(
                [_on_kv(number, 10 + i)[at], abi.Synchronize(None, 1)]
                for i, number in enumerate(_KV.values())
            ),
            judge=one_error,
        )
        for at, command in enumerate(_on_kv(1, 1))
    ),
    _asked(
        "queues, streams, subscriptions, children: forged",
        "P7",
        "answered: 2 2 2 2 2 2",
        *(
            [
                abi.Synchronize(1, 77),
                abi.HttpRead(2, 77),
                abi.HttpClose(3, 77),
                abi.NextMessage(4, 77),
                abi.SendChild(5, 77, b"x"),
                abi.WaitChild(6, 77),
            ],
        ),
    ),
    _asked(
        "embeds used after they were freed",
        "P7",
        "answered: 2",
        [
            abi.AllocEmb(None, 1, 60, 2),
            abi.EmbedTxt(None, 1, (60, 0), [5], 0),
            abi.DeallocEmb(None, 1, 60),
            abi.Forward(1, 1, (60, 0, 1), []),
        ],
    ),
    _asked(
        "spans beyond a handle, over 2**32, and of freed pages",
        "P7",
        "answered: 3 3 3",
        [
            abi.AllocKvPage(None, 1, 61, 2),
            abi.MaskKvPage(1, 1, (61, 0, 1000), True),
            abi.Synchronize(None, 1),
        ],
        [abi.MaskKvPage(2, 1, (61, _U32, _U32), True), abi.Synchronize(None, 1)],
        [abi.DeallocKvPage(None, 1, 61, 0, 1), abi.MaskKvPage(3, 1, (61, 0, 1), True)],
    ),
    _asked(
        "a handle made twice",
        "P7",
        "answered: 2",
        [abi.AllocKvPage(None, 1, 62, 1), abi.AllocKvPage(1, 1, 62, 1)],
    ),
    _asked(
        "ring places outside of the rings",
        "P1",
        "answered: 5 5 5",
        [
            abi.AllocEmb(None, 1, 63, 1),
            abi.EmbedTxt(None, 1, (63, 0), [5], 0),
            abi.GetNextDist(1, 1, (63, 0), 4, 1 << 30),
            abi.Synchronize(None, 1),
        ],
        [abi.ReadEmb(2, 1, (63, 0, 1), _U32 - 3), abi.Synchronize(None, 1)],
        [abi.WriteEmb(3, 1, (63, 0, 1), _U32 - 3, 0)],
    ),
    _asked(
        "more pages, embeds, queues than the quota",
        "P5",
        "answered: 7 7 7",
        [abi.AllocKvPage(1, 1, 70, 1 << 30), abi.Synchronize(None, 1)],
        [abi.AllocEmb(2, 1, 70, 1 << 22), abi.Synchronize(None, 1)],
        [*[abi.CreateQueue(None, q) for q in range(2, 257)], abi.CreateQueue(3, 500)],
    ),
    Case(
        "a key twice in a map",
        "P6",
        "answered: 15",
        "octets",
        # http_get of a host that nobody granted, with the header "a" two times
        (body(b"\x91\x95\x1f\1\1\xa9http://x/\x82\xa1a\xa1b\xa1a\xa1c"), "g"),
        judge=codes,
        quick=True,
    ),
]
LOADS = [
    Case("900 that connect and say nothing", "P6", "held", "octets", ("s",), crowd=900,
         stays="held", not_on=dict.fromkeys(("python", "node", "perl"), "the same connection")),
    Case("half a frame, and no more", "P6", "held", "octets", (x(framed(RIGHT)[:20]), "s"),
         stays="held", quick=True),
    Case("never reads its answers", "P6", "ended: over_quota", "octets",
         (frame(abi.Tokenize(1, 0, "one two three " * 1000)), "l"), quick=False),
    Case("frames without end, and reads nothing", "P6", "ended: over_quota", "octets",
         (frame(*[abi.Tokenize(i, 0, "a text of a few words " * 20) for i in range(100)]), "l"),
         quick=True),
    Case("large commands without end", "P6", "held", "octets",
         (frame(QUEUE, abi.AllocEmb(None, 1, 7, 1)),
          frame(abi.EmbedTxt(None, 1, (7, 0), [300] * 15000, 0), abi.Synchronize(None, 1)), "l"),
         stays="held", quick=True),
    Case("steps without end", "P5", "held", "octets",
         (frame(QUEUE, abi.AllocEmb(None, 1, 7, 64),
                abi.EmbedTxt(None, 1, (7, 0), [5] * 64, list(range(64)))),
          frame(*[abi.Forward(None, 1, (7, 0, 64), [])] * 200, abi.Synchronize(None, 1)), "l"),
         crowd=2, stays="held", quick=True),
    Case("holds all KV pages and sleeps", "P5", "held", "octets",
         (frame(QUEUE, abi.AllocKvPage(1, 1, 7, 2000)), "g", "s"), quotas={"kv_pages": "2000"},
         crowd=2, stays="held", quick=True),
    Case("changes masks in ring in while they are read", "P6", "600 answers, 300 steps or more",
         "ring", MASKED, judge=rounds(300), quick=True),
    Case("changes vectors in ring in while they are read", "P6", "600 answers, 300 steps or more",
         "ring", VECTORS, judge=rounds(300), quick=True),
]  # fmt: skip
# what starts the services of the host, which then stay
WARM = (frame(abi.StoreGet(1, "key"), abi.HttpGet(2, 1, "http://x/")), "g", "g")
CASES = [*FRAMES, CUT, PARTIAL, *HANDLES, *LOADS]
