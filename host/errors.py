"""Errors that the host and the CLI show to people: what, why, what to try, and an exit code.

HostError        125: piehost itself failed
├── BadUsage       2: the command line is wrong
├── Refused      126: the program cannot run here
└── NotFound     127: there is no such program or inferlet
"""

from __future__ import annotations

from typing import ClassVar

from piehost.wire.client import EXIT_HOST, EXIT_NOT_FOUND, EXIT_REFUSED, EXIT_USAGE, Reason


class HostError(Exception):
    exit_code: ClassVar[int] = EXIT_HOST
    default_code: ClassVar[str] = "host"

    def __init__(self, what: str, why: str = "", hint: str = "", code: str = "") -> None:
        super().__init__(what)
        self.reason = Reason(code=code or self.default_code, what=what, why=why, hint=hint)

    def __str__(self) -> str:
        return format_reason(self.reason)


class BadUsage(HostError):
    exit_code = EXIT_USAGE
    default_code = "usage"


class Refused(HostError):
    exit_code = EXIT_REFUSED
    default_code = "refused"


class NotFound(HostError):
    exit_code = EXIT_NOT_FOUND
    default_code = "not_found"


class FailedAnswer(HostError):
    """The host answered `Failed`; carries its exit code as it is."""

    def __init__(self, exit_code: int, reason: Reason) -> None:
        super().__init__(reason.what, reason.why, reason.hint, reason.code)
        self.answered_code = exit_code


def exit_code_of(error: HostError) -> int:
    return error.answered_code if isinstance(error, FailedAnswer) else error.exit_code


def format_reason(reason: Reason) -> str:
    """One to three lines: what, why, try."""
    lines = [f"piehost: {reason.what}"]
    if reason.why:
        lines.append(f"  why: {reason.why}")
    if reason.hint:
        lines.append(f"  try: {reason.hint}")
    return "\n".join(lines)
