"""What one seat may do and has used."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from inferlet.errors import QuotaError, UnavailableError

from piehost.wire.services import Grant

from .grants import EgressGrant, parse_grant
from .lookup import MAX_LOOKUPS


class Account:
    """`report(octets)` is called with what has been used since its last call."""

    def __init__(self, grant: Grant, report: Callable[[int], None]) -> None:
        self.slots = asyncio.Semaphore(MAX_LOOKUPS)
        self._report = report
        self._used = 0
        self.update(grant)

    def update(self, grant: Grant) -> None:
        """What is granted from now on; what was used stays used."""
        self._egress = grant.egress
        self.seconds = grant.egress_seconds
        self._octets = grant.egress_bytes

    def grants(self) -> list[EgressGrant]:
        """UnavailableError if one of them is none, which the host should have found."""
        try:
            return [parse_grant(text) for text in self._egress]
        except ValueError as error:
            raise UnavailableError(f"the launch was granted what cannot be: {error}") from None

    def charge(self, octets: int) -> None:
        """Counts octets of a body, either way. QuotaError if that is more than is left, of which
        then nothing is left."""
        cost = min(octets, max(self._octets - self._used, 0))
        self._used += cost
        if cost:
            self._report(cost)
        if cost < octets:
            raise self._over()

    def check_left(self) -> None:
        """QuotaError if nothing is left."""
        if self._used >= self._octets:
            raise self._over()

    def _over(self) -> QuotaError:
        return QuotaError(
            f"the bodies sent and received exceed this inferlet's {self._octets} octets",
            "launch it with a larger --quota egress_bytes",
        )
