"""Topics: broadcasts among the inferlets of one user, or of one job.

The cost of a broadcast is bounded by MAX_SUBSCRIBERS, and its sender has no more than its turn
(`Requests.take`), so that a flood of them holds up the flooder. What waits for an inferlet is
bounded by its mailboxes: newer messages are lost, and a mark in their place says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from inferlet import abi
from inferlet.errors import HandleError, LaggedError, QuotaError

from .mailbox import Mailbox
from .names import check_name
from .seat import Seat, unused

MAX_SUBSCRIBERS: Final = 4096  # subscriptions to one topic of one user (or job)

Scope = tuple[str, str | None, str]  # user, job (None: all of them), topic


class Subscription:
    __slots__ = ("mailbox", "scope")

    def __init__(self, scope: Scope, mailbox: Mailbox) -> None:
        self.scope = scope
        self.mailbox = mailbox


class Topics:
    """Who listens to what."""

    def __init__(self) -> None:
        # subscriptions in order of arrival; a topic without any has no entry
        self._scopes: dict[Scope, dict[Subscription, None]] = {}
        self.handlers: dict[type[abi.Command], Callable[[Seat, Any], None]] = {
            abi.Broadcast: self._broadcast,
            abi.Subscribe: self._subscribe,
            abi.Unsubscribe: self._unsubscribe,
            abi.NextMessage: self._next_message,
        }

    def forget(self, seat: Seat) -> None:
        """The inferlet has ended."""
        for subscription in seat.subscriptions.values():
            self._leave(subscription)
        seat.subscriptions.clear()

    def _broadcast(self, seat: Seat, c: abi.Broadcast) -> None:
        listeners = self._scopes.get(_scope(seat, c.topic, c.job), {})
        message, octets = (c.data, seat.id), len(c.data)
        got = 0
        for listener in listeners:
            mailbox = listener.mailbox
            if mailbox.has_room(octets):
                mailbox.put(message, octets)
                got += 1
            elif mailbox.latest is not _LOST:
                mailbox.put(_LOST, 0)
        seat.answer(c.req, got)

    def _subscribe(self, seat: Seat, c: abi.Subscribe) -> None:
        unused(seat.subscriptions, c.subscription, "subscription")
        scope = _scope(seat, c.topic, c.job)
        if len(seat.subscriptions) >= seat.limits.subscriptions:
            raise QuotaError(
                f"{len(seat.subscriptions)} subscriptions are open; the cap is "
                f"{seat.limits.subscriptions}",
                "unsubscribe first, or launch with a larger --quota subscriptions",
            )
        listeners = self._scopes.setdefault(scope, {})
        if len(listeners) >= MAX_SUBSCRIBERS:
            raise QuotaError(
                f"{MAX_SUBSCRIBERS} subscriptions to {c.topic!r} are open", "use several topics"
            )
        mailbox = Mailbox(seat.heard, "the subscription has ended")
        subscription = Subscription(scope, mailbox)
        listeners[subscription] = None
        seat.subscriptions[c.subscription] = subscription
        seat.answer(c.req, None)

    def _unsubscribe(self, seat: Seat, c: abi.Unsubscribe) -> None:
        subscription = seat.subscriptions.pop(c.subscription, None)
        if subscription is None:
            raise _no_subscription(c.subscription)
        self._leave(subscription)
        seat.answer(c.req, None)

    def _leave(self, subscription: Subscription) -> None:
        listeners = self._scopes[subscription.scope]
        del listeners[subscription]
        if not listeners:
            del self._scopes[subscription.scope]
        subscription.mailbox.drop()

    @staticmethod
    def _next_message(seat: Seat, c: abi.NextMessage) -> None:
        subscription = seat.subscriptions.get(c.subscription)
        if subscription is None:
            raise _no_subscription(c.subscription)
        subscription.mailbox.receive(seat, c.req)


def _scope(seat: Seat, topic: str, job: bool) -> Scope:
    check_name(topic)
    return (seat.user, seat.job if job else None, topic)


def _no_subscription(handle: int) -> HandleError:
    return HandleError(f"no subscription has handle {handle}", "subscribe first")


_LOST: Final = LaggedError(
    "messages were lost here: the inferlet did not read fast enough",
    "go on reading; keep next_message waiting, or send less",
)
