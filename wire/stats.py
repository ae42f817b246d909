"""Counters that travel from the controller to the host and on to clients.

Apart from `control.py`, so that a client need not import the ABI (and NumPy with it).
"""

from __future__ import annotations

from msgspec import Struct


class SeatStats(Struct, kw_only=True):
    """Counters of one inferlet since its launch (gauges where said)."""

    steps: int = 0  # steps it had a forward or a sample in
    batch_sum: int = 0  # over those steps, the number of segments in the step
    tokens_in: int = 0  # inputs of forward passes
    tokens_out: int = 0  # tokens sampled and delivered
    frames_in: int = 0
    frames_out: int = 0
    message_bytes: int = 0  # both ways, over the socket
    ring_bytes: int = 0
    commands: int = 0
    kv_pages: int = 0  # gauge
    embeds: int = 0  # gauge
    queued: int = 0  # gauge
    swapped_pages: int = 0  # gauge: of its KV pages, those in host memory
    slowed_seconds: float = 0.0  # held up by its rates
    waits_for: str = ""  # gauge: what holds it up now, such as "rate" or "pages"; empty: nothing


class ControllerStats(Struct, kw_only=True):
    """Counters of the controller since it started (gauges where said)."""

    seats: int = 0  # gauge
    pages_free: int = 0  # gauge
    pages_total: int = 0
    rows_free: int = 0  # gauge
    rows_total: int = 0
    steps: int = 0
    decode_steps: int = 0  # steps with at least one one-token segment
    decode_segments: int = 0  # one-token segments; mean decode batch = segments / steps
    tokens_in: int = 0
    tokens_out: int = 0
    backend_seconds: float = 0.0
    swap_free: int = 0  # gauge: pages of host memory that hold none of the KV pool's
    swap_total: int = 0
    swapped_out: int = 0  # pages moved to host memory
    swapped_in: int = 0  # and back
