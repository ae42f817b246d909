"""Write inferlets for piehost in Python.

    from inferlet import Model, inferlet

    @inferlet
    def complete(model: Model, prompt: str, max_tokens: int = 16):
        with model.context(prompt) as context:
            yield from context.generate(max_tokens)

Calls return at once; what has an answer gives a `Future`, with `.result()` and `await`.
"""

from .context import Context
from .errors import (
    ArgumentError,
    BackendError,
    CancelledError,
    ClosedError,
    FrameError,
    HandleError,
    InferletError,
    MaskError,
    OutOfMemoryError,
    PositionError,
    QuotaError,
    SharedPageError,
    SpanError,
    TraitError,
    UnwrittenError,
)
from .future import Future
from .generation import TextStream, TokenStream
from .model import Model, available_models, available_traits
from .program import inferlet
from .queue import Queue
from .ring import Distribution
from .runtime import Runtime, args, flush, get_arg, receive, send
from .sampling import Sampling, Token
from .spans import Embeds, KvSpan
from .text import StreamDecoder, Vocabulary

__all__ = [
    "ArgumentError",
    "BackendError",
    "CancelledError",
    "ClosedError",
    "Context",
    "Distribution",
    "Embeds",
    "FrameError",
    "Future",
    "HandleError",
    "InferletError",
    "KvSpan",
    "MaskError",
    "Model",
    "OutOfMemoryError",
    "PositionError",
    "Queue",
    "QuotaError",
    "Runtime",
    "Sampling",
    "SharedPageError",
    "SpanError",
    "StreamDecoder",
    "TextStream",
    "Token",
    "TokenStream",
    "TraitError",
    "UnwrittenError",
    "Vocabulary",
    "args",
    "available_models",
    "available_traits",
    "flush",
    "get_arg",
    "inferlet",
    "receive",
    "send",
]
