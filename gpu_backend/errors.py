"""Why a model cannot be served: what, why, and what to try."""

from __future__ import annotations


class LoadError(Exception):
    """Refuses a model. `message` says what and why, `hint` what to try."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
