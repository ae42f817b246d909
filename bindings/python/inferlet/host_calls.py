"""Calls of the host's services (the store, HTTP, children): the controller takes only so many
before they are answered, so the others wait here, in order, and leave as answers come."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from . import abi

# docs/abi.md, section 8
_MOST_CALLS = 64
_MOST_OCTETS = 1 << 20

_COUNTED = frozenset(
    (
        abi.Quota,
        abi.StoreGet,
        abi.StoreSet,
        abi.StoreDelete,
        abi.StoreExists,
        abi.StoreList,
        abi.HttpGet,
        abi.HttpPost,
        abi.HttpWrite,
        abi.HttpRead,
        abi.Spawn,
    )
)
# those and others, not counted, but of no use before them: they keep their place
HOST_CALLS = _COUNTED | {
    abi.HttpClose,
    abi.SendChild,
    abi.ReceiveChild,
    abi.CloseChild,
    abi.WaitChild,
    abi.EndChild,
}


class HostCalls:
    """Those that wait for their answers, and those that wait to be sent."""

    def __init__(self) -> None:
        self.asked: dict[int, int] = {}  # octets by request
        self._octets = 0  # of them all
        self.held: deque[tuple[abi.Command, bytes]] = deque()

    def hold(self, command: abi.Command, octets: bytes) -> bool:
        """True if `command`, one of `HOST_CALLS` encoded as `octets`, has to wait here; false if it
        may leave."""
        if not self.held and self._admit(command, octets):
            return False
        self.held.append((command, octets))
        return True

    def ready(self) -> Iterator[bytes]:
        """Those held that may leave by now."""
        while self.held and self._admit(*self.held[0]):
            yield self.held.popleft()[1]

    def answered(self, request: int) -> None:
        """The answer to `request` has come."""
        self._octets -= self.asked.pop(request, 0)

    def _admit(self, command: abi.Command, octets: bytes) -> bool:
        if type(command) not in _COUNTED or command.req is None:
            return True
        if len(self.asked) == _MOST_CALLS or self._octets + len(octets) > _MOST_OCTETS:
            return False
        self.asked[command.req] = len(octets)
        self._octets += len(octets)
        return True
