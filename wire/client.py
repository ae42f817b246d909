"""Client and host: launch programs, pass messages, ask what runs. ZeroMQ DEALER to ROUTER over ipc.

One ZeroMQ message is one msgpack struct, single-part. `request` is a number the client chooses; it
is private to the client and names a launch or a question until its last answer (`Ended`, `Failed`
or the answer itself). `Hello` comes first: its pid is how the host notices that the client died.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

from msgspec import Struct

from .stats import ControllerStats, SeatStats

# Exit codes of `piehost launch` beside the inferlet's own and 128 + signal.
EXIT_USAGE: Final = 2  # of the command line, as for every verb
EXIT_HOST: Final = 125  # piehost itself failed
EXIT_REFUSED: Final = 126  # the program cannot run here
EXIT_NOT_FOUND: Final = 127

MAX_INPUT_BYTES: Final = 60000  # one message to the inferlet (inferlet.abi.MAX_MESSAGE_BYTES)

# The client acknowledges what it read every ACK_BYTES; a client with more than MAX_UNREAD_BYTES
# unread has its inferlets ended, so that the host's memory stays bounded. Likewise an inferlet with
# more than that to receive is ended; a client that sends no more than INPUT_WINDOW ahead of
# `InputTaken` never gets there. Each message counts for its data and MESSAGE_OVERHEAD.
ACK_BYTES: Final = 1 << 18
MAX_UNREAD_BYTES: Final = 64 << 20
INPUT_WINDOW: Final = 1 << 20
MESSAGE_OVERHEAD: Final = 256

MAX_CLIENT_MESSAGE: Final = 4 << 20  # octets; a client that sends more is disconnected


def weight(data: bytes) -> int:
    """What a message counts for."""
    return len(data) + MESSAGE_OVERHEAD


class Reason(Struct, kw_only=True):
    """Why something did not work or was ended: what happened, why, what to try."""

    code: str  # a stable name, such as "bad_frame", "not_found", "stopped"
    what: str
    why: str = ""
    hint: str = ""


class Usage(Struct, kw_only=True):
    """What the process of an inferlet used."""

    user_seconds: float
    system_seconds: float
    max_rss_bytes: int


class Hello(Struct, array_like=True, tag="hello"):
    pid: int


class Bye(Struct, array_like=True, tag="bye"):
    """The client closes: what it launched is ended."""


class Launch(Struct, array_like=True, tag="launch"):
    """Answered with `Started`, then `Message`s and `Output`s, then `Ended`; or with `Failed`."""

    request: int
    program: str  # absolute path of a .py, an executable, or a folder with inferlet.toml
    args: list[str]
    quotas: dict[str, str] = {}  # as given with --quota key=value
    waived: list[str] = []  # sandbox controls given up by name
    egress: list[str] = []  # where http_get and http_post may go: HOST[:PORT], as --egress gives it
    user: str = ""  # whose store, topics and exports it sees; empty: the user who runs the host
    job: str = ""  # empty: its own id
    record: str = ""  # absolute path of a new file to record the run in
    weather: str = ""  # for `piehost conform`: how its connection behaves; with `record` only


class Input(Struct, array_like=True, tag="input"):
    """A message for the `receive` of launch `request`; at most 60,000 octets."""

    request: int
    data: bytes


class CloseInput(Struct, array_like=True, tag="close_input"):
    request: int


class Cancel(Struct, array_like=True, tag="cancel"):
    """Ends launch `request` of this client; its `Ended` follows."""

    request: int


class Ack(Struct, array_like=True, tag="ack"):
    """`Message`s and `Output`s of the weight `size` were read."""

    size: int


class Stop(Struct, array_like=True, tag="stop"):
    """Ends the inferlet with this id, or all (nil). Answered with `Stopped`, or `Failed`."""

    request: int
    id: str | None


class List(Struct, array_like=True, tag="list"):
    """Answered with `Listing`."""

    request: int
    ended: bool = False  # also the last ones that ended


class Inspect(Struct, array_like=True, tag="inspect"):
    """All about the inferlet with this id, which may be one of the last that ended. Answered with
    `Inspected`, or `Failed`."""

    request: int
    id: str


class SetQuota(Struct, array_like=True, tag="set_quota"):
    """The operator changes quotas of the running inferlet `id`, all or none: `key=value` as of
    --quota. Answered with `QuotaIsSet`, or `Failed`."""

    request: int
    id: str
    quotas: dict[str, str]


class Models(Struct, array_like=True, tag="models"):
    request: int


class AskStats(Struct, array_like=True, tag="ask_stats"):
    request: int


class Progress(Struct, array_like=True, tag="progress"):
    """The model is loading; launches wait for it. Sent to clients that have a launch waiting."""

    stage: str
    fraction: float


class Started(Struct, array_like=True, tag="started"):
    request: int
    id: str
    pid: int


class Message(Struct, array_like=True, tag="message"):
    """From the inferlet's `send`."""

    request: int
    data: bytes


class InputTaken(Struct, array_like=True, tag="input_taken"):
    """The inferlet has received messages of this weight since the last `InputTaken`."""

    request: int
    weight: int


class Output(Struct, array_like=True, tag="output"):
    """What the inferlet wrote to its stdout (1) or stderr (2)."""

    request: int
    stream: int
    data: bytes


class Ended(Struct, array_like=True, tag="ended"):
    """`code` is the exit code, or 128 + signal; 125 if piehost's own failure ended it."""

    request: int
    code: int
    reason: Reason | None
    stats: SeatStats
    usage: Usage | None


class Failed(Struct, array_like=True, tag="failed"):
    """The launch or question `request` came to nothing; `code` is the exit code for a CLI."""

    request: int
    code: int
    reason: Reason


class InferletInfo(Struct, kw_only=True):
    id: str
    program: str
    pid: int
    client_pid: int
    state: str  # "starting", "running" or "ending"
    seconds: float  # since the launch
    stats: SeatStats
    user: str = ""
    job: str = ""
    parent: str = ""  # the id of the inferlet that spawned it; empty if a client launched it
    name: str = ""  # of the program, which the id begins with
    cpu_seconds: float = 0.0  # user and system time of the process
    memory_bytes: int = 0  # resident
    reason: Reason | None = None  # why it is being ended


class EndedInfo(Struct, kw_only=True):
    """An inferlet that has ended."""

    id: str
    program: str
    code: int  # as of `Ended`
    reason: Reason | None
    at: float  # Unix time
    seconds: float  # from launch to end
    stats: SeatStats
    usage: Usage | None
    user: str = ""
    job: str = ""
    parent: str = ""


class QuotaUse(Struct, kw_only=True):
    cap: int | None  # None: there is none
    used: float | None  # None: not measured, or nothing that is used up
    source: str  # where the cap is given, such as "default", "inferlet.toml" or "quota set"


class Details(Struct, kw_only=True):
    """What `Listing` has not of a running inferlet."""

    quotas: dict[str, QuotaUse]  # by key
    controls: list[str]  # of the sandbox, in force
    waived: list[str]  # by --allow-degraded: in force only if this machine has them
    egress: list[str]  # grants
    children: list[str]  # ids
    profile: str
    cgroups: list[str]  # folders of its control group, one in each hierarchy


class Listing(Struct, array_like=True, tag="listing"):
    """`ended` is in the order of their ends, the last at the end."""

    request: int
    inferlets: list[InferletInfo]
    ended: list[EndedInfo] = []


class Inspected(Struct, array_like=True, tag="inspected"):
    """`info` and `details` if it runs, else `ended`."""

    request: int
    info: InferletInfo | None
    details: Details | None
    ended: EndedInfo | None


class QuotaIsSet(Struct, array_like=True, tag="quota_is_set"):
    """`before` and `after` are what was changed, by key."""

    request: int
    before: dict[str, int | None]
    after: dict[str, int | None]


class Stopped(Struct, array_like=True, tag="stopped"):
    request: int
    ids: list[str]


class ModelList(Struct, array_like=True, tag="model_list"):
    """`model` is nil while it loads, else `inferlet.abi.ModelInfo` as a map (clients do not import
    the ABI). `options` is how the server was started."""

    request: int
    options: dict[str, str]
    model: dict[str, Any] | None
    device: str
    engine: str
    pages: int
    load_seconds: float


class HostStats(Struct, array_like=True, tag="host_stats"):
    request: int
    controller: ControllerStats
    seats: dict[str, SeatStats]  # by inferlet id
    children: dict[str, int]  # pid of each process the host started, by name
    launches: int
    restarts: int
    rings_ready: int


ClientToHost: TypeAlias = (
    Hello
    | Bye
    | Launch
    | Input
    | CloseInput
    | Cancel
    | Ack
    | Stop
    | List
    | Inspect
    | SetQuota
    | Models
    | AskStats
)
HostToClient: TypeAlias = (
    Progress
    | Started
    | Message
    | InputTaken
    | Output
    | Ended
    | Failed
    | Listing
    | Inspected
    | QuotaIsSet
    | Stopped
    | ModelList
    | HostStats
)
