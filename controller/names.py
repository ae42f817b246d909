"""Names that inferlets choose: topics, exports, keys of the store."""

from __future__ import annotations

from inferlet.abi import MAX_TOPIC_BYTES
from inferlet.errors import ArgumentError


def check_name(name: str) -> None:
    """ArgumentError beyond MAX_TOPIC_BYTES; the decoder has counted characters only."""
    size = len(name.encode())
    if size > MAX_TOPIC_BYTES:
        raise ArgumentError(
            f"a name of {size} octets; the most is {MAX_TOPIC_BYTES}", "use a shorter one"
        )
