"""Shared memory between processes: rings (`ring.py`) and sealed start-up blocks (`memfd.py`).

Rings carry data only. Offsets, lengths and releases travel in messages, so there is no control
word in shared memory; and what an inferlet can write is copied once before it is looked at.
"""

if __name__ != "piehost.host.shm":
    raise ImportError(
        f"import piehost.host.shm, not {__name__}: a second copy would be another module"
    )

from .memfd import sealed_memfd
from .ring import RingReader, RingWriter, create_ring, create_ring_in, seal_ring

__all__ = [
    "RingReader",
    "RingWriter",
    "create_ring",
    "create_ring_in",
    "seal_ring",
    "sealed_memfd",
]
