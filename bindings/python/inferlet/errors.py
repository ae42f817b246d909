"""Every error of the ABI: one table of codes, one exception each, what / why / try in each.

InferletError
├── FrameError            the frame itself is wrong; the inferlet is ended
├── HandleError           a handle that is forged, stale, foreign or in use
├── SpanError             a span outside what its handle holds
├── PositionError         a position beyond the model's context
├── ArgumentError         K, a sampling parameter, a token id or a ring range out of range
├── MaskError             a mask of the wrong size
├── QuotaError            a cap of this inferlet: pages, embeds, tokens, commands
├── SharedPageError       a write into a page that others hold
├── UnwrittenError        an embed or a token read before anything wrote it
├── CancelledError        dropped by `cancel` or by its queue's end
├── OutOfMemoryError      the machine's KV pages or embeds are used up
├── BackendError          the step failed or the backend is gone
├── TraitError            the model does not realise that trait
├── ClosedError           the other side will send no more
├── DeniedError           not allowed to this inferlet: a host nobody granted
├── NotFoundError         no export or child program has that name
├── UnavailableError      a service outside failed: the web server, the store, a launch
└── LaggedError           messages of a subscription were lost because it was not read
"""

from __future__ import annotations

from typing import ClassVar, Final


class InferletError(Exception):
    """An error answer: `message` says what and why, `hint` says what to try."""

    code: ClassVar[int] = 0
    name: ClassVar[str] = "inferlet"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.name}: {self.message}"
        return f"{text} (try: {self.hint})" if self.hint else text


class FrameError(InferletError):
    code, name = 1, "bad_frame"


class HandleError(InferletError):
    code, name = 2, "bad_handle"


class SpanError(InferletError):
    code, name = 3, "bad_span"


class PositionError(InferletError):
    code, name = 4, "bad_position"


class ArgumentError(InferletError):
    code, name = 5, "bad_argument"


class MaskError(InferletError):
    code, name = 6, "bad_mask"


class QuotaError(InferletError):
    code, name = 7, "over_quota"


class SharedPageError(InferletError):
    code, name = 8, "shared_page"


class UnwrittenError(InferletError):
    code, name = 9, "unwritten"


class CancelledError(InferletError):
    code, name = 10, "cancelled"


class OutOfMemoryError(InferletError):
    code, name = 11, "out_of_memory"


class BackendError(InferletError):
    code, name = 12, "backend"


class TraitError(InferletError):
    code, name = 13, "missing_trait"


class ClosedError(InferletError):
    code, name = 14, "closed"


class DeniedError(InferletError):
    code, name = 15, "denied"


class NotFoundError(InferletError):
    code, name = 16, "not_found"


class UnavailableError(InferletError):
    code, name = 17, "unavailable"


class LaggedError(InferletError):
    code, name = 18, "lagged"


BY_CODE: Final[dict[int, type[InferletError]]] = {
    e.code: e
    for e in (
        FrameError,
        HandleError,
        SpanError,
        PositionError,
        ArgumentError,
        MaskError,
        QuotaError,
        SharedPageError,
        UnwrittenError,
        CancelledError,
        OutOfMemoryError,
        BackendError,
        TraitError,
        ClosedError,
        DeniedError,
        NotFoundError,
        UnavailableError,
        LaggedError,
    )
}


def from_answer(code: int, message: str, hint: str) -> InferletError:
    """The exception for an error answer; an unknown code gives the base class."""
    return BY_CODE.get(code, InferletError)(message, hint)
