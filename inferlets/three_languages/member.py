"""The member of three_languages that is written in Python, with bindings/python.

It does what the other two do: saves its part, says so, and goes on from each.
"""

from __future__ import annotations

from typing import NamedTuple

from inferlet import Model, Subscription, broadcast


class Result(NamedTuple):
    """`who` went on from the pages that `whose` had saved."""

    who: str
    whose: str
    sender: str  # id of the inferlet that said they are there
    tokens: int  # that the pages are of
    pages: int  # imported
    text: str


async def take_part(model: Model, group: Subscription, part: str, count: int) -> list[Result]:
    """The member's work, from the broadcast "start LANGUAGE ..." on."""
    members = (await group.receive()).text.split()[1:]
    with model.context(part) as context:
        context.save(f"{group.topic}/python")  # the export holds the pages, so the context may go
    broadcast(group.topic, "saved python", job=True)
    results = []
    for _ in members:  # its own pages are one of them
        message = await group.receive()
        whose = message.text.removeprefix("saved ")
        with model.restore(f"{group.topic}/{whose}") as context:  # computes nothing again
            tokens, pages = len(context), context.stats.pages
            text = "".join([piece async for piece in context.generate(count)])
        results.append(Result("python", whose, message.sender, tokens, pages, text))
    return results
