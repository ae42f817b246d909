"""Marks of tests that need an interpreter which not every machine has."""

from __future__ import annotations

import pytest

from piehost.host.sandbox import interpreters
from piehost.host.sandbox.failure import SpawnRefused


def missing(kind: str) -> str:
    """Why tests with that interpreter are skipped; empty if they are not."""
    try:
        interpreters.locate(kind)
    except SpawnRefused as refused:
        return refused.message
    return ""


needs_node = pytest.mark.skipif(bool(missing("node")), reason=missing("node"))
needs_perl = pytest.mark.skipif(bool(missing("perl")), reason=missing("perl"))
