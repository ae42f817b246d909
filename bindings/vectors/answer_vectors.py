"""Golden vectors of every kind of answer and every error."""

from __future__ import annotations

from encoding import U32_MAX, Vector, answers

ANY_REQUEST = 7
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
    (15, "denied"),
    (16, "not_found"),
    (17, "unavailable"),
    (18, "lagged"),
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
        answers("sample with its log-probability", [0, 1, [42, -0.25, 0]]),
        answers("sample with its distribution", [0, 1, [70000, -12.5, 256]]),
        answers(
            "what is left",
            [0, 1, {"kv_pages": 1024, "cpu_seconds": 1.5, "egress_bytes": 2**40, "children": 0}],
        ),
        answers("nothing is limited", [0, 1, {}]),
        answers("a broadcast's reach", [0, 1, 3]),
        answers("a message of a subscription", [0, 1, [b"hello", "a1b2"]]),
        answers("an empty message of a subscription", [0, 1, [b"", "a1b2"]]),
        answers("a value of the store", [0, 1, b"\x00\xff value"]),
        answers("true", [0, 1, True]),
        answers("false", [0, 1, False]),
        answers("keys", [0, 1, ["a", "b\u00e9", "c" * 40]]),
        answers("no keys", [0, 1, []]),
        answers("256 keys", [0, 1, [f"key:{i:05}" for i in range(256)]]),
        answers(
            "a response",
            [0, 1, [200, {"content-type": "text/html; charset=utf-8", "content-length": "12"}]],
        ),
        answers("a response without headers", [0, 1, [404, {}]]),
        answers("a child's id", [0, 1, "c3d4"]),
        answers("an exit code", [0, 1, 137]),
        answers("an import", [0, 1, [4, b"\x01\x02"]]),
        answers("an import without meta", [0, 1, [1, b""]]),
        answers("exports", [0, 1, [["doc/1", 4, "a1b2", 3599.5], ["doc/2", 1, "c3d4", None]]]),
        answers("no exports", [0, 1, []]),
        answers("vectors written", [0, 1, 2]),
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
