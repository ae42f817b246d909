"""Golden vectors of every command: as the bindings write them, and with fields left out."""

from __future__ import annotations

from encoding import U32_MAX, Vector, commands, short

# the fields of sample after `lazy`: mask, bias, history, penalties, logprobs, k, offset
PLAIN = [None, [], None, 1.0, 0.0, 0.0, False, 0, 0]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "h\u00e9llo \u4e16\u754c"},
]


def all_commands() -> list[Vector]:
    decode_loop = [
        command
        for i in range(8)
        for command in (
            [16, None, 1, [1, 9], [-2], 100 + i],
            [17, None, 1, [1, 9, 1], [[1, 0, 100 + i]], [1, 100 + i, 1], [1, 9, 1], None, None],
            [19, 200 + i, 1, [1, 9], 1, 0.0, 0, 1.0, 0.0, None, [2], True, *PLAIN],
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
        commands(
            "sample, defaults",
            [19, None, 1, [1, 0], 1, 0.0, 0, 1.0, 0.0, None, [], False, *PLAIN],
        ),
        commands(
            "sample, every field of the draw",
            [19, 12, 1, [1, 0], 5, 0.75, 40, 0.875, 0.0625, 2**64 - 1, [2, 300], True, *PLAIN],
        ),
        commands("sample, seed 0", [19, 12, 1, [1, 0], 5, 1.0, 0, 1.0, 0.0, 0, [], False, *PLAIN]),
        commands(
            "sample, every field",
            [
                *[19, 13, 1, [1, 0], 5, 0.75, 40, 0.875, 0.0625, 7, [2, 300], True],
                *[4096, [[5, -2.5], [70000, 100.0]], 9, 1.25, -0.5, 0.75, True, 256, 8192],
            ],
        ),
        commands(
            "sample, a mask at the ring's first octet",
            [19, 14, 1, [1, 0], 5, 0.0, 0, 1.0, 0.0, None, [], False, 0, *PLAIN[1:]],
        ),
        commands(
            "sample, penalties to their bounds",
            [
                *[19, 15, 1, [1, 0], 5, 1e6, 0, 1.0, 1.0, None, [], False],
                *[None, [], U32_MAX, 1e6, 1e6, -1e6, False, 0, 0],
            ],
        ),
        commands("tokenize, defaults", [20, 13, 0, "The capital of France is", True]),
        commands("tokenize, every field", [20, 14, 1, "h\u00e9llo \u4e16\u754c \U0001f600", False]),
        commands("tokenize, str 16", [20, 15, 0, "word " * 100, True]),
        commands("quota", [21, 16]),
        commands("broadcast, defaults", [22, None, "news", b"hello", False]),
        commands("broadcast, every field", [22, 17, "n\u00e9ws", b"", True]),
        commands("broadcast, the longest topic", [22, 18, "t" * 256, b"x" * 256, False]),
        commands("subscribe, defaults", [23, None, 1, "news", False]),
        commands("subscribe, every field", [23, 19, U32_MAX, "news", True]),
        commands("unsubscribe", [24, None, 1]),
        commands("next_message", [25, 20, 1]),
        commands("store_get", [26, 21, "k"]),
        commands("store_set", [27, 22, "a key", b"\x00\xff value"]),
        commands("store_set, the most", [27, 22, "k", b"v" * 60000]),
        commands("store_delete", [28, 23, "k"]),
        commands("store_exists", [29, 24, "\u4e16"]),
        commands("store_list, defaults", [30, 25, "", ""]),
        commands("store_list, every field", [30, 26, "user:", "user:42"]),
        commands("http_get, defaults", [31, 27, 1, "https://example.org/", {}]),
        commands(
            "http_get, every field",
            [31, 28, 1, "http://example.org:8080/a?b=c", {"accept": "text/plain", "x-empty": ""}],
        ),
        commands(
            "http_get, the most",
            [31, 29, 1, "u" * 8192, {f"x-header-{i}": str(i) for i in range(64)}],
        ),
        commands("http_post, defaults", [32, 30, 2, "https://example.org/", b"", {}, False]),
        commands(
            "http_post, every field",
            [32, 31, 2, "https://example.org/", b'{"a": 1}', {"content-type": "json"}, True],
        ),
        commands("http_write, the last", [33, None, 2, b"rest", False]),
        commands("http_write, every field", [33, 32, 2, b"more", True]),
        commands("http_read", [34, 33, 2]),
        commands("http_close", [35, None, 2]),
        commands("spawn, defaults", [36, 34, 1, "", []]),
        commands("spawn, every field", [36, 35, 1, "worker", ["--prompt", "Caf\u00e9", ""]]),
        commands("send_child", [37, None, 1, b"task"]),
        commands("receive_child", [38, 36, 1]),
        commands("close_child", [39, None, 1]),
        commands("wait_child", [40, 37, 1]),
        commands("end_child", [41, None, 1]),
        commands("export_kvpage, defaults", [42, None, 1, "prefix", [[1, 0, 4]], b"", None]),
        commands(
            "export_kvpage, every field",
            [42, 38, 1, "pr\u00e9fixe", [[1, 0, 4], [2, 3, 1]], b"\x01\x02", 3600],
        ),
        commands("unexport_kvpage", [43, 39, "prefix"]),
        commands("import_kvpage", [44, 40, 1, 3, "prefix"]),
        commands("list_exported, defaults", [45, 41, "", ""]),
        commands("list_exported, every field", [45, 42, "doc/", "doc/7"]),
        commands("read_emb", [46, 43, 1, [1, 3, 2], 1024]),
        commands("write_emb, defaults", [47, None, 1, [1, 0, 1], 0, 0]),
        commands("write_emb, first position", [47, 44, 1, [1, 0, 3], 64, 2**31 - 3]),
        commands("write_emb, every position", [47, 45, 1, [1, 0, 3], 64, [9, 0, 2**31 - 1]]),
        commands("alloc_history, defaults", [48, None, 1, 1, []]),
        commands("alloc_history, every field", [48, 46, 1, 1, [5, -2, 70000]]),
        commands("extend_history", [49, None, 1, 1, [-2, 0]]),
        commands("dealloc_history", [50, None, 1, 1]),
        commands("chat, defaults", [51, 47, 0, MESSAGES, True]),
        commands("chat, every field", [51, 48, 1, MESSAGES[1:], False]),
        commands("chat, no messages", [51, 49, 0, [], True]),
        commands("a frame of 255 octets", [1, None, b"x" * 249]),
        commands("a frame of 256 octets", [1, None, b"x" * 250]),
        commands("a long frame: eight decode steps with lazy samples", *decode_loop),
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
            [19, 1, 1, [1, 0], 1, 0.0, 0, 1.0, 0.0, None, [], False, *PLAIN],
        ),
        short(
            "sample, three fields",
            [19, 1, 1, [1, 0], 1, 0.5, 3, 0.5],
            [19, 1, 1, [1, 0], 1, 0.5, 3, 0.5, 0.0, None, [], False, *PLAIN],
        ),
        short(
            "sample, to lazy",
            [19, 1, 1, [1, 0], 1, 0.5, 3, 0.5, 0.0, 5, [2], True],
            [19, 1, 1, [1, 0], 1, 0.5, 3, 0.5, 0.0, 5, [2], True, *PLAIN],
        ),
        short(
            "sample, to the bias",
            [19, 1, 1, [1, 0], 1, 0.5, 3, 0.5, 0.0, 5, [2], True, 64, [[1, 0.5]]],
            [19, 1, 1, [1, 0], 1, 0.5, 3, 0.5, 0.0, 5, [2], True, 64, [[1, 0.5]], *PLAIN[2:]],
        ),
        short("tokenize", [20, 1, 0, "x"], [20, 1, 0, "x", True]),
        short("broadcast", [22, 1, "t", b""], [22, 1, "t", b"", False]),
        short("subscribe", [23, 1, 1, "t"], [23, 1, 1, "t", False]),
        short("store_list", [30, 1], [30, 1, "", ""]),
        short("store_list, one field", [30, 1, "a"], [30, 1, "a", ""]),
        short("http_get", [31, 1, 1, "u"], [31, 1, 1, "u", {}]),
        short("http_post", [32, 1, 1, "u"], [32, 1, 1, "u", b"", {}, False]),
        short("http_write", [33, 1, 1, b"x"], [33, 1, 1, b"x", False]),
        short("spawn", [36, 1, 1], [36, 1, 1, "", []]),
        short(
            "export_kvpage", [42, 1, 1, "n", [[1, 0, 1]]], [42, 1, 1, "n", [[1, 0, 1]], b"", None]
        ),
        short("list_exported", [45, 1], [45, 1, "", ""]),
        short("write_emb", [47, 1, 1, [1, 0, 1], 0], [47, 1, 1, [1, 0, 1], 0, 0]),
        short("alloc_history", [48, 1, 1, 1], [48, 1, 1, 1, []]),
        short("chat", [51, 1, 0, MESSAGES], [51, 1, 0, MESSAGES, True]),
    ]
