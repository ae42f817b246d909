"""Golden vectors of what lies in shared memory: vocabulary tables and start-up blocks."""

from __future__ import annotations

import struct
from typing import Any

from encoding import Vector, packed


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
        "ring_in_bytes": 1 << 19,
        "history": 65536,
        "export_pages": 512,
        "children": 8,
        "subscriptions": 64,
        "http_streams": 4,
        "store_bytes": 1 << 24,
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
    plain = {
        "abi": 1,
        "version": "0.2.0",
        "id": "a1b2",
        "user": "ann",
        "job": "a1b2",
        "deadline": None,
        "args": [],
        "models": [model],
        "limits": limits,
    }
    child = {"id": "c3d4", "user": "z\u00e9", "job": "night run", "deadline": 1790000000.25}
    args = ["--prompt", "Caf\u00e9 \u4e16\u754c", "", "x" * 300]
    return [
        block("no arguments", plain),
        block("arguments, two models", {**plain, "args": args, "models": [model, second]}),
        block("a child with a deadline", {**plain, **child}),
        block("no model", {**plain, "models": []}),
        block("unknown keys", {**plain, "later": {"x": [1, 2]}, "limits": {**limits, "new": 1}}),
    ]
