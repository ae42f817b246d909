"""Writes the golden vectors of the inferlet ABI: byte-exact examples that every binding replays.

    python bindings/vectors/generate.py [folder]

It knows `docs/abi.md` and nothing of any binding: frames are built from plain lists, so that a
mistake in a binding's types shows as a difference. The files are JSON lists of objects:

- `commands.json`, `answers.json`: `name`, `direction` (`to_controller` or `to_inferlet`),
  `frame_hex` (the whole ZMTP message, header included) and `commands` or `answers`: the body as
  JSON, where msgpack bin is `{"hex": "..."}` (no map has such a key). A binding encodes exactly
  these octets: smallest msgpack forms, floats always float64, maps in the order given, trailing
  optional fields always written.
- `short_commands.json`: commands with trailing optional fields left out. No binding of ours writes
  them; a controller reads them as the full `commands` beside them.
- `bad_frames.json`: `name`, `direction`, `frame_hex` and `why`: each ends the inferlet.
- `vocab_table.json`: `table_hex`, `pieces` (hex of each token's text), `special` (bool each) and
  `detokenize`: pairs of `tokens` and `text_hex`.
- `startup.json`: `block_hex` and `startup`, the map in it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from answer_vectors import all_answers
from bad_vectors import all_bad
from block_vectors import startup_blocks, vocab_tables
from command_vectors import all_commands, all_short
from encoding import Vector


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
