"""What a scripted controller does beside queues: messages, a store, the web, children, exports.

All of one user; there is no other inferlet but those that a test speaks for (`deliver`, `web`,
`programs`). Answers to what has to wait come when the test, or another command, brings it about.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from inferlet import abi
from inferlet.errors import (
    ArgumentError,
    ClosedError,
    DeniedError,
    HandleError,
    InferletError,
    LaggedError,
    NotFoundError,
    QuotaError,
    TraitError,
)

PAGE = 3  # names in one answer of a listing

Answer = Callable[[int | None, object], None]


@dataclass
class Box:
    """Messages, and requests that wait for one."""

    messages: deque[Any] = field(default_factory=deque)
    waiting: deque[int | None] = field(default_factory=deque)
    closed: bool = False


@dataclass
class Subscription(Box):
    topic: str = ""
    job: bool = False
    lagged: bool = False


@dataclass
class Site:
    """What `web` has at a URL."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    parts: list[bytes] = field(default_factory=list)
    error: InferletError | None = None


@dataclass
class Stream:
    site: Site
    body: bytearray
    request: int | None  # of the http_get or http_post, while its body is not whole
    parts: deque[bytes]


@dataclass
class Child(Box):
    exit: int | None = None
    waits: list[int | None] = field(default_factory=list)


class Services:
    """`answer(request, value or error)` sends."""

    def __init__(
        self, limits: abi.Limits, answer: Answer, exports: dict[str, abi.ExportKvPage]
    ) -> None:
        self.limits = limits
        self.send_answer = answer
        self.hold_answers = False  # of the store, until `answer_held`
        self.held: list[tuple[int | None, object]] = []
        self.most_held = 0
        self.subscriptions: dict[int, Subscription] = {}
        self.store: dict[str, bytes] = {}
        self.web: dict[str, Site] = {}
        self.requests: list[tuple[str, str, dict[str, str], bytearray]] = []
        self.streams: dict[int, Stream] = {}
        self.refuse_writes: InferletError | None = None
        self.child_room = 1 << 20  # octets of a message to a child
        # a program gets (child, message or None at the end) and speaks by `say` and `exit`
        self.programs: dict[str, Callable[[int, bytes | None], None]] = {}
        self.children: dict[int, Child] = {}
        self.exports = exports

    def answer(self, request: int | None, value: object) -> None:
        self.send_answer(request, value)

    def _answer_store(self, request: int | None, value: object) -> None:
        if self.hold_answers:
            self.held.append((request, value))
            self.most_held = max(self.most_held, len(self.held))
        else:
            self.answer(request, value)

    def answer_held(self) -> None:
        """Lets answers go that were held, and holds no more."""
        self.hold_answers = False
        while self.held:
            self.answer(*self.held.pop(0))

    def take(self, command: Any) -> bool:
        """Carries `command` out, if it is one of these."""
        method = getattr(self, "_" + type(command).__name__, None)
        if method is None:
            return False
        try:
            method(command)
        except InferletError as error:
            self.answer(command.req, error)
        return True

    def _Quota(self, c: abi.Quota) -> None:  # noqa: N802
        self.answer(c.req, {"kv_pages": self.limits.kv_pages, "cpu_seconds": 1.5})

    # --- messages --------------------------------------------------------------------------

    def deliver(self, topic: str, data: bytes, sender: str, job: bool = False) -> int:
        reached = 0
        for subscription in self.subscriptions.values():
            if (subscription.topic, subscription.job) == (topic, job):
                reached += 1
                subscription.messages.append([data, sender])
                self._serve(subscription)
        return reached

    def _serve(self, box: Box) -> None:
        while box.waiting and (box.messages or box.closed or getattr(box, "lagged", False)):
            request = box.waiting.popleft()
            if isinstance(box, Subscription) and box.lagged:
                box.lagged = False
                self.answer(request, LaggedError("messages were lost", "read sooner"))
            elif box.messages:
                self.answer(request, box.messages.popleft())
            else:
                self.answer(request, ClosedError("there will be no more", "stop receiving"))

    def _Broadcast(self, c: abi.Broadcast) -> None:  # noqa: N802
        self.answer(c.req, self.deliver(c.topic, c.data, "test", c.job))

    def _Subscribe(self, c: abi.Subscribe) -> None:  # noqa: N802
        if len(self.subscriptions) == self.limits.subscriptions:
            raise QuotaError("too many subscriptions", "end some")
        self.subscriptions[c.subscription] = Subscription(topic=c.topic, job=c.job)
        self.answer(c.req, None)

    def _Unsubscribe(self, c: abi.Unsubscribe) -> None:  # noqa: N802
        box = self._known(self.subscriptions, c.subscription)
        del self.subscriptions[c.subscription]
        box.messages.clear()
        box.closed = True
        self._serve(box)
        self.answer(c.req, None)

    def _NextMessage(self, c: abi.NextMessage) -> None:  # noqa: N802
        box = self._known(self.subscriptions, c.subscription)
        box.waiting.append(c.req)
        self._serve(box)

    # --- the store -------------------------------------------------------------------------

    def _StoreGet(self, c: abi.StoreGet) -> None:  # noqa: N802
        self._answer_store(c.req, self.store.get(c.key))

    def _StoreSet(self, c: abi.StoreSet) -> None:  # noqa: N802
        self.store[c.key] = c.value
        self._answer_store(c.req, None)

    def _StoreDelete(self, c: abi.StoreDelete) -> None:  # noqa: N802
        self._answer_store(c.req, self.store.pop(c.key, None) is not None)

    def _StoreExists(self, c: abi.StoreExists) -> None:  # noqa: N802
        self._answer_store(c.req, c.key in self.store)

    def _StoreList(self, c: abi.StoreList) -> None:  # noqa: N802
        self._answer_store(c.req, self._page(list(self.store), c.prefix, c.after))

    def _page(self, names: list[str], prefix: str, after: str) -> list[str]:
        return sorted(n for n in names if n.startswith(prefix) and n > after)[:PAGE]

    # --- the web ---------------------------------------------------------------------------

    def _HttpGet(self, c: abi.HttpGet) -> None:  # noqa: N802
        self._open("GET", c, bytearray(), False)

    def _HttpPost(self, c: abi.HttpPost) -> None:  # noqa: N802
        self._open("POST", c, bytearray(c.body), c.more)

    def _open(self, method: str, c: Any, body: bytearray, more: bool) -> None:
        if len(self.streams) == self.limits.http_streams:
            raise QuotaError("too many streams", "close some")
        self.requests.append((method, c.url, c.headers, body))
        site = self.web.get(c.url)
        if site is None:
            raise DeniedError(f"{c.url} was not granted", "launch with --egress")
        stream = Stream(site, body, c.req if more else None, deque(site.parts))
        self.streams[c.stream] = stream
        if not more:
            self._respond(c.req, c.stream)

    def _respond(self, request: int | None, handle: int) -> None:
        site = self.streams[handle].site
        if site.error is not None:
            del self.streams[handle]
        self.answer(request, site.error or [site.status, site.headers])

    def _HttpWrite(self, c: abi.HttpWrite) -> None:  # noqa: N802
        stream = self._known(self.streams, c.stream)
        if self.refuse_writes is not None:
            raise self.refuse_writes
        stream.body += c.data
        self.answer(c.req, None)
        if not c.more:
            self._respond(stream.request, c.stream)

    def _HttpRead(self, c: abi.HttpRead) -> None:  # noqa: N802
        stream = self._known(self.streams, c.stream)
        self.answer(c.req, stream.parts.popleft() if stream.parts else b"")

    def _HttpClose(self, c: abi.HttpClose) -> None:  # noqa: N802
        self._known(self.streams, c.stream)
        del self.streams[c.stream]
        self.answer(c.req, None)

    # --- children --------------------------------------------------------------------------

    def say(self, child: int, message: bytes) -> None:
        """The child sends."""
        self.children[child].messages.append(message)
        self._serve(self.children[child])

    def exit(self, child: int, code: int) -> None:
        """The child ends."""
        box = self.children[child]
        box.exit, box.closed = code, True
        self._serve(box)
        for request in box.waits:
            self.answer(request, code)

    def _Spawn(self, c: abi.Spawn) -> None:  # noqa: N802
        if c.program not in self.programs:
            raise NotFoundError(f"no child {c.program!r}", "name it under [children]")
        self.children[c.child] = Child()
        self.answer(c.req, f"child-{c.child}")
        for arg in c.args:
            self.programs[c.program](c.child, arg.encode())

    def _SendChild(self, c: abi.SendChild) -> None:  # noqa: N802
        box = self._known(self.children, c.child)
        if box.closed:
            raise ClosedError("it takes no more messages", "stop sending")
        if len(c.data) > self.child_room:
            raise QuotaError("too much waits for the child", "let it receive some")
        self.answer(c.req, None)
        self.programs[""](c.child, c.data)

    def _CloseChild(self, c: abi.CloseChild) -> None:  # noqa: N802
        self._known(self.children, c.child)
        self.programs[""](c.child, None)

    def _ReceiveChild(self, c: abi.ReceiveChild) -> None:  # noqa: N802
        box = self._known(self.children, c.child)
        box.waiting.append(c.req)
        self._serve(box)

    def _WaitChild(self, c: abi.WaitChild) -> None:  # noqa: N802
        box = self._known(self.children, c.child)
        if box.exit is not None:
            self.answer(c.req, box.exit)
        else:
            box.waits.append(c.req)

    def _EndChild(self, c: abi.EndChild) -> None:  # noqa: N802
        box = self._known(self.children, c.child)
        if box.exit is None:
            self.exit(c.child, 128 + 9)
        del self.children[c.child]

    # --- names of exports, and text --------------------------------------------------------

    def _UnexportKvPage(self, c: abi.UnexportKvPage) -> None:  # noqa: N802
        if self.exports.pop(c.name, None) is None:
            raise NotFoundError(f"no export {c.name!r}", "export_kvpage it first")
        self.answer(c.req, None)

    def _ListExported(self, c: abi.ListExported) -> None:  # noqa: N802
        names = self._page(list(self.exports), c.prefix, c.after)
        entries = []
        for name in names:
            lease = self.exports[name].lease
            pages = sum(count for _, _, count in self.exports[name].pages)
            entries.append([name, pages, "test", None if lease is None else float(lease)])
        self.answer(c.req, entries)

    def _Chat(self, c: abi.Chat) -> None:  # noqa: N802
        if not c.messages:
            raise TraitError("the model has no template", "use tokenize")
        if any(m.get("role") not in ("user", "system", "assistant") for m in c.messages):
            raise ArgumentError("the template refuses the role", "use user")
        text = "".join(f"[{m['role']}]{m['content']}" for m in c.messages)
        self.answer(c.req, list((text + "[assistant]" * c.generation_prompt).encode()))

    def _known(self, table: dict[int, Any], handle: int) -> Any:
        if handle not in table:
            raise HandleError(f"no {handle}", "make it first")
        return table[handle]
