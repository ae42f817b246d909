"""What tests have the scripted device go on from: its tokens are octets."""

from __future__ import annotations

PROMPT = list(b"The capital of France is")
