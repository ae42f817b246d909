"""Checks what `--egress` gives: that it is a grant, and within what the server allows at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .egress.addresses import Network, special_range
from .egress.grants import DEFAULT_PORTS, EgressGrant, is_within, parse_grant
from .errors import Refused


def check(
    asked: Iterable[str],
    ceiling: Sequence[str] | None = None,
    *,
    asked_in: str = "--egress",
    ceiling_in: str = "`piehost serve --egress`",
) -> None:
    """Refused unless all of `asked` are grants, each within one of `ceiling` if there is one. The
    last two say in errors where they were given."""
    allowed = None if ceiling is None else [_parsed(text, ceiling_in) for text in ceiling]
    for text in asked:
        grant = _parsed(text, asked_in)
        if allowed is not None and not any(_covers(each, grant) for each in allowed):
            raise Refused(
                f"this server lets no inferlet reach {text}",
                f"{ceiling_in} gives {', '.join(ceiling or ()) or 'nothing'}",
                "one of these, or another server",
                "bad_egress",
            )


def _parsed(text: str, where: str) -> EgressGrant:
    try:
        return parse_grant(text)
    except ValueError as error:
        raise Refused(
            f"{where} {text} is no grant",
            str(error),
            "HOST[:PORT], where HOST is a name, *.name, an address, or a network as 10.1.0.0/16",
            "bad_egress",
        ) from error


def _covers(ceiling: EgressGrant, grant: EgressGrant) -> bool:
    """Whether every place that `grant` allows is one that `ceiling` allows."""
    if ceiling.port != grant.port and (
        ceiling.port is not None or grant.port not in DEFAULT_PORTS.values()
    ):
        return False
    if ceiling.network is None or grant.network is None:
        return ceiling.network is grant.network and _covers_name(ceiling, grant)
    return _covers_network(ceiling.network, grant.network)


def _covers_name(ceiling: EgressGrant, grant: EgressGrant) -> bool:
    if ceiling.name == grant.name:
        return ceiling.below == grant.below
    return ceiling.below and grant.name.endswith(f".{ceiling.name}")


def _covers_network(ceiling: Network, grant: Network) -> bool:
    if ceiling.version != grant.version or not is_within(grant, ceiling):
        return False
    special = special_range(grant[0])  # a network wider than such a range does not allow it
    return special is None or not is_within(grant, special[1]) or is_within(ceiling, special[1])
