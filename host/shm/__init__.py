"""Shared memory between processes: rings out (`ring.py`) and sealed start-up blocks (`memfd.py`).

Rings carry data only. Offsets, lengths and releases travel in messages, so there is no control
word in shared memory and host-side code never reads a ring.
"""

if __name__ != "piehost.host.shm":
    raise ImportError(
        f"import piehost.host.shm, not {__name__}: a second copy would be another module"
    )

from .memfd import sealed_memfd
from .ring import RingWriter, create_ring, seal_ring

__all__ = ["RingWriter", "create_ring", "seal_ring", "sealed_memfd"]
