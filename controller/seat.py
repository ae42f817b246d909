"""One inferlet: its socket, its handles, its answers on the way out.

Everything read here is hostile until `_decode` has typed and bounded it. A frame that does not
decode raises FrameError, and the caller ends this inferlet alone.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import msgspec
from inferlet import abi
from inferlet.abi import AnyCommand
from inferlet.errors import FrameError, HandleError, InferletError, QuotaError

from piehost.wire.control import Admit, Rates, SeatStats

from .accounts import Account
from .attention import Allowance
from .mailbox import MAX_WAITING_BYTES, ClientMailbox, Held, Mailbox
from .rates import Pace
from .tables import EmbBlock, History, KvBlock, Late, Queue
from .weights import Weights

if TYPE_CHECKING:
    from .children import Child
    from .messaging import Subscription
    from .services import Stream

# Answers that an inferlet may leave unread: the host's replies to all that it may ask at once
# (64 of 60,000 octets), 1 MiB of messages and `meta`, and as much again.
MAX_BACKLOG_BYTES: Final = 6 << 20
# Answers that nobody waits for share a frame: 16 leave at once, 8 after 0.1 s, fewer after 0.4 s.
LAZY_MANY: Final = 16
LAZY_FEW: Final = 8
LAZY_SECONDS: Final = 0.1  # ten updates a second still read as a stream
LAZY_MOST_SECONDS: Final = 0.4
MAX_QUEUES: Final = 256
_READ_BYTES: Final = abi.MAX_FRAME_BYTES + 9

_decode = msgspec.msgpack.Decoder(abi.Frame).decode
_encode = msgspec.msgpack.Encoder().encode


class Seat:
    """An admitted inferlet. `number` grows with launch order, `account` is its user's."""

    def __init__(
        self, admit: Admit, account: Account, sock: socket.socket, outgoing: set[Seat]
    ) -> None:
        self.number = admit.seat
        self.id = admit.id
        self.user = admit.user
        self.job = admit.job
        self.limits = admit.limits
        self.stats = SeatStats()
        self.account = account
        self.pace: Pace | None = None
        self.served = 0.0  # of what its user had of the accelerator, see accounts.py
        self.worked = 0.0  # and of the controller
        self.allowance = Allowance(time.monotonic())  # of the latter, beside others
        self.set_rates(admit.rates)
        self.queues: dict[int, Queue] = {}
        self.kvs: dict[int, KvBlock] = {}
        self.embs: dict[int, EmbBlock] = {}
        self.tokens: dict[int, Late] = {}
        self.histories: dict[int, History] = {}
        self.pages_held = 0  # by handles: a page that two of them share counts twice
        self.swapped = 0  # of these, those in host memory
        self.absent = False  # some are, or it gives way to those who wait for pages
        self.movable: tuple[object, int] = (None, 0)  # pages, as of a state; see `Swapping`
        self.last_step = 0  # the latest with a part of it, or its pages on their way back
        self.landed = 0  # the latest of these that was answered
        self.embeds_held = 0
        self.history_held = 0  # tokens in histories, those that may yet be left out too
        self.queued = 0  # commands waiting in all queues, or with an answer that waits
        self.weights = Weights()  # of those that wait
        self.inbox: Mailbox = ClientMailbox()  # for `receive`
        self.taken = 0  # messages received that the host has not been told of
        self.taken_bytes = 0
        self.subscriptions: dict[int, Subscription] = {}
        self.heard = Held()  # what waits in all of them
        self.children: dict[int, Child] = {}
        self.link: Child | None = None  # its parent's end, if it has one
        self.streams: dict[int, Stream] = {}
        self.asked: set[int] = set()  # the host's services owe it replies to these
        self.asked_bytes = 0
        self.waiting = 0  # requests that wait for messages or for a child's end
        self.frames: list[list[AnyCommand]] = []  # read, and left for the next turn
        self.in_line = False  # waits for its turn, to go on with them or to be read
        self.watched: int = select.EPOLLIN  # what epoll tells of
        self.unsent = 0  # octets of messages among the answers not yet encoded
        self.leaving = False  # its process is dead; what it wrote last is being carried out
        self.closed = False
        self.sock = sock
        sock.setblocking(False)
        self.broken: FrameError | None = None  # what ends it once all before is carried out
        self._partial = bytearray()
        self._outgoing = outgoing  # seats with answers to flush
        self._answers: list[tuple[object, ...]] = []
        self._lazy = 0  # how many answers at the end of _answers may wait
        self._lazy_since = 0.0
        self._backlog = bytearray()  # encoded, the socket did not take it yet

    # --- rates and limits -----------------------------------------------------

    def set_rates(self, rates: Rates) -> None:
        self.rates = rates
        self.share = max(rates.share, 1)
        self.allowance.set_share(self.share)
        self.priority = rates.priority
        now = time.monotonic()
        self.count_slowed(now)
        limited = rates.tokens_per_second is not None or rates.commands_per_second is not None
        self.pace = Pace(rates, now, self.stats.slowed_seconds) if limited else None

    def set_limits(self, limits: abi.Limits) -> None:
        """But for the sizes of the rings, which are mapped as they are."""
        self.limits = msgspec.structs.replace(
            limits, ring_bytes=self.limits.ring_bytes, ring_in_bytes=self.limits.ring_in_bytes
        )

    def count_slowed(self, now: float) -> None:
        """Brings its counter up to date. `now`: seconds, monotonic."""
        if self.pace is not None:
            self.stats.slowed_seconds = self.pace.slowed(now)

    # --- pages ----------------------------------------------------------------

    def check_pages(self, pages: int) -> None:
        """QuotaError unless a new handle with so many pages keeps to the caps."""
        if len(self.kvs) >= self.limits.kv_pages:  # those with no page left take memory too
            raise QuotaError(
                f"{len(self.kvs)} kv handles are open; the cap is {self.limits.kv_pages}",
                "free handles done with as a whole",
            )
        if self.pages_held + pages > self.limits.kv_pages:
            raise QuotaError(
                f"{pages} KV pages more than the {self.pages_held} held; the cap is "
                f"{self.limits.kv_pages}",
                "free pages first, or launch with a larger --quota kv_pages",
            )

    def check_unread(self, octets: int) -> None:
        """QuotaError if answers with so much more data would pile up unread."""
        if self.unread + octets > MAX_WAITING_BYTES:
            raise QuotaError(
                f"{self.unread} octets of answers are unread, and this one has {octets}; the most "
                f"is {MAX_WAITING_BYTES}",
                "wait for some of their answers first",
            )

    def distinct_pages(self) -> int:
        """How many pages its handles hold, each counted once."""
        return len({page for kv in self.kvs.values() for page in kv.pages if page != -1})

    # --- in -------------------------------------------------------------------

    def read(self) -> list[list[AnyCommand]] | None:
        """The whole frames that have arrived; None if nothing has. `broken` is set if a bad one
        came behind them.

        EOFError at the end of the connection.
        """
        try:
            data = self.sock.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            raise EOFError(str(error)) from error
        if not data:
            raise EOFError
        if self._partial:
            self._partial += data
            data = bytes(self._partial)
        frames: list[list[AnyCommand]] = []
        try:
            used = self._decode_frames(data, frames)
        except FrameError as error:
            self.broken = error
        else:
            self._partial = bytearray(data[used:]) if used < len(data) else bytearray()
        return frames

    def _decode_frames(self, data: bytes, frames: list[list[AnyCommand]]) -> int:
        """Appends what is whole to `frames`; returns how many octets that was. FrameError."""
        at, end = 0, len(data)
        while at < end:
            flags = data[at]
            if flags == 0:
                start = at + 2
                size = data[at + 1] if end > at + 1 else 0
            elif flags == abi.FLAG_LONG:
                start = at + 9
                size = int.from_bytes(data[at + 1 : start], "big") if end >= start else 0
            else:
                raise FrameError(
                    f"frame flags 0x{flags:02x}: only single-part messages are taken",
                    "write flags 00 (one size octet) or 02 (eight size octets)",
                )
            if size > abi.MAX_FRAME_BYTES:
                raise FrameError(
                    f"a frame of {size} octets; the most is {abi.MAX_FRAME_BYTES}",
                    "split the commands over several frames",
                )
            if end < start or end < start + size:
                break
            at = start + size
            frames.append(self._decode(data[start:at]))
            self.stats.frames_in += 1
            self.stats.message_bytes += size
        return at

    def _decode(self, body: bytes) -> list[AnyCommand]:
        try:
            commands: list[AnyCommand] = _decode(body)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise FrameError(
                f"a frame that is not a list of commands: {error}", "see docs/abi.md, section 8"
            ) from error
        return commands

    # --- out ------------------------------------------------------------------

    def answer(self, request: int | None, value: object) -> None:
        if request is not None:
            self._urgent((abi.ANSWER_OK, request, value))

    def fail(self, request: int | None, error: InferletError) -> None:
        if request is not None:
            self._urgent((abi.ANSWER_ERROR, request, error.code, error.message, error.hint))

    def _urgent(self, answer: tuple[object, ...]) -> None:
        if self.closed:
            return
        self._answers.append(answer)
        self._lazy = 0
        self._outgoing.add(self)

    def answer_lazily(self, request: int | None, value: object, now: float) -> None:
        """An answer that may wait for company. `now`: seconds, monotonic."""
        if request is None or self.closed:
            return
        if self._lazy == len(self._answers):  # nothing urgent waits
            if self._lazy == 0:
                self._lazy_since = now
            self._lazy += 1
        self._answers.append((abi.ANSWER_OK, request, value))
        self._outgoing.add(self)

    def due(self) -> float:
        """When its answers are to be sent: seconds, monotonic; 0 is at once."""
        if self._lazy != len(self._answers) or self._lazy >= LAZY_MANY:
            return 0.0
        wait = LAZY_SECONDS if self._lazy >= LAZY_FEW else LAZY_MOST_SECONDS
        return self._lazy_since + wait

    def flush(self) -> None:
        """Sends the answers that wait, as far as the socket takes them."""
        if self._answers:
            self._put(self._answers)
            self._answers = []
            self._lazy = 0
            self.unsent = 0
        self.drain()

    def _put(self, answers: list[tuple[object, ...]]) -> None:
        body = _encode(answers)
        if len(body) > abi.MAX_FRAME_BYTES:  # never one answer alone: each is bounded
            middle = len(answers) // 2
            self._put(answers[:middle])
            self._put(answers[middle:])
            return
        self._backlog += abi.frame_header(len(body))
        self._backlog += body
        self.stats.frames_out += 1
        self.stats.message_bytes += len(body)

    def drain(self) -> None:
        """Writes as much of the backlog as the socket takes now."""
        if not self._backlog or self.closed:
            return
        try:
            sent = self.sock.send(self._backlog)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # the inferlet is gone; its end-of-file is on the way
            self._backlog.clear()
            return
        del self._backlog[:sent]

    @property
    def has_backlog(self) -> bool:
        """The socket has not taken everything yet."""
        return bool(self._backlog)

    @property
    def unread(self) -> int:
        """Octets of answers that the socket has not taken; of those not yet encoded, messages."""
        return len(self._backlog) + self.unsent

    @property
    def overflowing(self) -> bool:
        """It does not read its answers."""
        return len(self._backlog) > MAX_BACKLOG_BYTES


def unused(table: Mapping[int, object], handle: int, kind: str) -> None:
    """HandleError if the handle is in use."""
    if handle in table:
        raise HandleError(f"{kind} handle {handle} is in use", "free it first, or choose another")
