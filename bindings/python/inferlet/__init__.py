"""Write inferlets for piehost in Python.

    from inferlet import Model, inferlet

    @inferlet
    def complete(model: Model, prompt: str, max_tokens: int = 16):
        with model.context(prompt) as context:
            yield from context.generate(max_tokens)

Calls return at once; what has an answer gives a `Future`, with `.result()` and `await`.
"""

from .branches import Best, best_of, generate_all, interleave
from .children import Child, spawn
from .constraints import END, characters, choice
from .context import Context, Stats
from .distribution import Distribution
from .errors import (
    ArgumentError,
    BackendError,
    CancelledError,
    ClosedError,
    DeniedError,
    FrameError,
    HandleError,
    InferletError,
    LaggedError,
    MaskError,
    NotFoundError,
    OutOfMemoryError,
    PositionError,
    QuotaError,
    SharedPageError,
    SpanError,
    TraitError,
    UnavailableError,
    UnwrittenError,
)
from .exports import Export, Imported, list_exported, unexport_kvpage
from .future import Future, gather
from .generation import TextStream, TokenStream
from .history import History
from .http import Head, Response, http_get, http_post
from .messages import Message, Subscription, broadcast, subscribe
from .model import Model, available_models, available_traits
from .program import inferlet
from .queue import Queue
from .runtime import (
    Runtime,
    args,
    deadline,
    flush,
    get_arg,
    get_instance_id,
    get_version,
    job,
    quota,
    receive,
    send,
    time_left,
    user,
)
from .samplers import mirostat, typical
from .sampling import Sampling, Token
from .saved import unsave
from .series import Listing
from .spans import Embeds, KvSpan
from .store import store_delete, store_exists, store_get, store_list, store_set
from .text import StreamDecoder, Vocabulary

__all__ = [
    "END",
    "ArgumentError",
    "BackendError",
    "Best",
    "CancelledError",
    "Child",
    "ClosedError",
    "Context",
    "DeniedError",
    "Distribution",
    "Embeds",
    "Export",
    "FrameError",
    "Future",
    "HandleError",
    "Head",
    "History",
    "Imported",
    "InferletError",
    "KvSpan",
    "LaggedError",
    "Listing",
    "MaskError",
    "Message",
    "Model",
    "NotFoundError",
    "OutOfMemoryError",
    "PositionError",
    "Queue",
    "QuotaError",
    "Response",
    "Runtime",
    "Sampling",
    "SharedPageError",
    "SpanError",
    "Stats",
    "StreamDecoder",
    "Subscription",
    "TextStream",
    "Token",
    "TokenStream",
    "TraitError",
    "UnavailableError",
    "UnwrittenError",
    "Vocabulary",
    "args",
    "available_models",
    "available_traits",
    "best_of",
    "broadcast",
    "characters",
    "choice",
    "deadline",
    "flush",
    "gather",
    "generate_all",
    "get_arg",
    "get_instance_id",
    "get_version",
    "http_get",
    "http_post",
    "inferlet",
    "interleave",
    "job",
    "list_exported",
    "mirostat",
    "quota",
    "receive",
    "send",
    "spawn",
    "store_delete",
    "store_exists",
    "store_get",
    "store_list",
    "store_set",
    "subscribe",
    "time_left",
    "typical",
    "unexport_kvpage",
    "unsave",
    "user",
]
