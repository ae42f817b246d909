"""From a target to the addresses the broker may connect to: the grants' last word.

The addresses that are checked here are those connected to; a name is not looked up a second time,
so a name server that answers differently the next moment (DNS rebinding) changes nothing.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from ipaddress import ip_address
from typing import Final

from inferlet.errors import DeniedError, UnavailableError

from .addresses import Address, special_range
from .grants import DEFAULT_PORTS, EgressGrant, allows, may_lead_to
from .target import Target

_THREADS: Final = 64  # getaddrinfo(3) blocks, for as long as a name server likes
MAX_LOOKUPS: Final = 4  # at once for one seat, so that a slow name server holds up nobody else


class Lookups:
    """The threads that ask the system's resolver."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, "lookup")

    async def addresses(
        self, target: Target, grants: Sequence[EgressGrant], slots: asyncio.Semaphore
    ) -> list[Address]:
        """What to connect to for `target`, at least one address. `slots` are the seat's lookups.

        DeniedError if the target is not granted or leads only where it must not, UnavailableError
        if there is no such name.
        """
        if not allows(grants, target.scheme, target.host, target.port):
            raise _not_granted(target)
        if not isinstance(target.host, str):
            return [target.host]
        found = await self._resolve(target, slots)
        allowed = [a for a in found if may_lead_to(grants, target.scheme, a, target.port)]
        if allowed:
            return allowed
        special = special_range(found[0])
        raise DeniedError(
            f"{target.host} is the address {found[0]}, which is "
            f"{special[0] if special else 'not public'}: a name may not lead there",
            f"have the address itself granted: --egress {_grant_for(found[0], target)}",
        )

    async def _resolve(self, target: Target, slots: asyncio.Semaphore) -> list[Address]:
        await slots.acquire()
        loop = asyncio.get_running_loop()

        def free(_: Future[list[Address]]) -> None:  # when the thread is done, whoever still waits
            loop.call_soon_threadsafe(slots.release)

        asked = self._pool.submit(_look_up, str(target.host))
        asked.add_done_callback(free)
        try:
            return await asyncio.wrap_future(asked)
        except (OSError, UnicodeError) as error:
            raise UnavailableError(
                f"the name {target.host} cannot be looked up: {error}",
                "check the name, and the name servers of the machine that runs piehost",
            ) from None


def _look_up(name: str) -> list[Address]:
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    texts = dict.fromkeys(str(info[4][0]).partition("%")[0] for info in found)
    return [ip_address(text) for text in texts]


def _not_granted(target: Target) -> DeniedError:
    return DeniedError(
        f"{target.host} port {target.port} ({target.scheme}) is not granted to this inferlet",
        f"launch it with --egress {_grant_for(target.host, target)}",
    )


def _grant_for(host: str | Address, target: Target) -> str:
    text = f"[{host}]" if ":" in str(host) else str(host)
    return text if target.port == DEFAULT_PORTS[target.scheme] else f"{text}:{target.port}"
