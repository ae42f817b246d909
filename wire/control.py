"""Host and controller: who is admitted, what passes to and from its client, who ends."""

from __future__ import annotations

from typing import Any, TypeAlias

from inferlet.abi import Limits, ModelInfo
from msgspec import Struct

from .services import Call
from .stats import ControllerStats as ControllerStats
from .stats import SeatStats as SeatStats


class Configure(Struct, array_like=True, tag="configure"):
    """First message to the controller; carries the tokenizer JSON's descriptor. The chat template
    is the model's."""

    model: ModelInfo
    pages: int
    rows: int
    scratch_slots: int
    policy: str = "work-conserving"  # or "eager"
    chunk_tokens: int = 256  # inputs of prompts that a step takes
    # for the chat template: "bos_token" and so on, as the tokenizer names and spells them
    special_tokens: dict[str, str] = {}
    swap_pages: int = 0  # of host memory; 0: when pages run out, inferlets are ended
    step_tokens: int = 512  # inputs that it takes in all


class Rates(Struct, kw_only=True, frozen=True):
    """What an inferlet gets of the accelerator over time. Passing a rate slows it, no more."""

    tokens_per_second: int | None = None  # inputs of forward passes; None: as many as there is room
    commands_per_second: int | None = None
    share: int = 100  # its user's weight against other users', see docs/architecture.md
    priority: int = 0  # against the same user's other inferlets: higher goes first


class Admit(Struct, array_like=True, tag="admit"):
    """A new inferlet; carries the controller's end of its socketpair. `seat` is unique for ever
    and grows with launch order (the newest has the largest); its ring has the same number."""

    seat: int
    id: str
    limits: Limits
    user: str = ""  # whose topics and exports it sees
    job: str = ""
    parent: int = 0  # the seat that spawned it; 0: a client launched it
    child: int = 0  # the number of the `Spawn` that it was started for
    rates: Rates = Rates()


class SetLimits(Struct, array_like=True, tag="set_limits"):
    """The operator changes what a running inferlet may use. What it holds beyond it stays."""

    seat: int
    limits: Limits
    rates: Rates


class ChildEnded(Struct, array_like=True, tag="child_ended"):
    """What was started for the `Spawn` of number `child` is dead, and its seat released."""

    child: int
    code: int  # 128 + n: signal n


class Reply(Struct, array_like=True, tag="reply"):
    """To the `Ask` of that number: the value that the inferlet is answered with, or an error of the
    ABI."""

    request: int
    value: Any = None
    error: tuple[int, str, str] | None = None  # code, message, hint


class Release(Struct, array_like=True, tag="release"):
    """The process of `seat` is dead: free all it held. Answered with `Released`."""

    seat: int


class Deliver(Struct, array_like=True, tag="deliver"):
    """A message from the client, for the inferlet's `receive`."""

    seat: int
    data: bytes


class CloseInput(Struct, array_like=True, tag="close_input"):
    """The client will send no more: `receive` fails with `closed` once the rest is read."""

    seat: int


class AskStats(Struct, array_like=True, tag="ask_stats"):
    request: int
    seat: int = 0  # tell of this one alone, and what it holds; 0: of all


class Released(Struct, array_like=True, tag="released"):
    seat: int
    stats: SeatStats


class Sent(Struct, array_like=True, tag="sent"):
    """The inferlet's `send`, for its client."""

    seat: int
    data: bytes


class Taken(Struct, array_like=True, tag="taken"):
    """The inferlet has received this many more messages, of `size` octets together. Reported now
    and then, so that the host knows how much waits for it."""

    seat: int
    messages: int
    size: int


class Ask(Struct, array_like=True, tag="ask"):
    """The inferlet calls a service of the host. Answered with `Reply`, once, unless the seat is
    released before. `request` is the controller's own number."""

    seat: int
    request: int
    call: Call


class End(Struct, array_like=True, tag="end"):
    """The controller ends this inferlet (bad frame, killed for memory): the host kills it."""

    seat: int
    code: str  # name of the error, such as "bad_frame" or "out_of_memory"
    message: str
    hint: str


class Stats(Struct, array_like=True, tag="stats"):
    request: int
    total: ControllerStats
    seats: dict[int, SeatStats]
    held: dict[str, float] = {}  # what the seat asked for holds, by key of its quota


class BackendLost(Struct, array_like=True, tag="backend_lost"):
    """The link to the backend ended; every queue fails with `backend` until the host restarts."""


HostToController: TypeAlias = (
    Configure | Admit | SetLimits | ChildEnded | Reply | Release | Deliver | CloseInput | AskStats
)
ControllerToHost: TypeAlias = Released | Sent | Taken | Ask | End | Stats | BackendLost
