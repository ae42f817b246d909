"""Golden vectors as what a fuzzer begins with: python fuzz/seeds.py c_decoder|frames FOLDER."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

VECTORS = Path(__file__).parents[1] / "bindings" / "vectors"
# of c_decoder.c: which of its readers; and where the frames are split
ANSWERS, STARTUP, VOCABULARY, SPLIT = b"\0", b"\1", b"\2", b"\5"


def vectors(name: str, field: str) -> Iterator[bytes]:
    for vector in json.loads((VECTORS / f"{name}.json").read_text()):
        yield bytes.fromhex(vector[field])


def c_decoder() -> Iterator[bytes]:
    for frame in vectors("answers", "frame_hex"):
        yield ANSWERS + SPLIT + frame
    for block in vectors("startup", "block_hex"):
        yield STARTUP + block
    for table in vectors("vocab_table", "table_hex"):
        yield VOCABULARY + table


def frames() -> Iterator[bytes]:
    """For `frames.py`: where the octets are split, then the octets."""
    for name in ("commands", "short_commands", "bad_frames"):
        for frame in vectors(name, "frame_hex"):
            if len(frame) < 4096:
                yield SPLIT + frame


def write(target: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate({"c_decoder": c_decoder, "frames": frames}[target]()):
        (folder / f"seed{index}").write_bytes(seed)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
