"""Python, C and JavaScript in one job: they speak by broadcasts and share KV pages.

Each member computes the pages of a part of its own and saves them under a name; then each goes on
from the pages of all three, which nobody computes twice. This program starts member.c and
member.mjs as its children, is the third member itself (member.py), and shows what came of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence

from inferlet import (
    ArgumentError,
    Child,
    ClosedError,
    Export,
    InferletError,
    Model,
    UnavailableError,
    broadcast,
    gather,
    get_instance_id,
    inferlet,
    list_exported,
    spawn,
    subscribe,
)
from member import Result, take_part

PARTS = {
    "python": "The capital of Egypt is Cairo. The capital of Peru is Lima. The capital of Japan is",
    "c": "The opposite of north is south. The opposite of east is west. The opposite of hot is",
    "node": "The chemical symbol of gold is Au. The chemical symbol of iron is",
}


async def message_of(language: str, child: Child) -> str:
    """The next message of a member. ClosedError if it has ended instead."""
    try:
        return (await child.receive()).decode("utf-8", "replace")
    except ClosedError:
        why = f"the member {language} has ended, with exit code {await child.wait()}"
        raise ClosedError(why, "its own words above say why") from None


async def reports(language: str, child: Child, count: int) -> list[Result]:
    """What `count` continuations of a member gave."""
    results = []
    for _ in range(count):
        whose, sender, tokens, pages, text = (await message_of(language, child)).split(" ", 4)
        results.append(Result(language, whose, sender, int(tokens), int(pages), text))
    return results


def table(members: Sequence[str], exports: dict[str, Export], results: list[Result]) -> str:
    """Whose pages who imported, and went on from with which text; who heard from whom."""
    row = "{:<10}{:<20}{:<13}{:>6}  {:>5}   {}\n".format
    text = row("pages of", "exported by", "imported by", "tokens", "pages", "and goes on with")
    for whose in members:
        first = [whose, exports[whose].exporter]
        for r in (r for who in members for r in results if (r.who, r.whose) == (who, whose)):
            said = json.dumps(r.text, ensure_ascii=False)
            text += row(*first, r.who, r.tokens, r.pages, said)
            first = ["", ""]
    text += "\n"
    for who in members:
        senders = {r.sender for r in results if r.who == who}
        others = [name for name in members if name != who and exports[name].exporter in senders]
        text += f"{who} heard from {' and '.join(others) or 'nobody'}\n"
    return text


@inferlet
async def three_languages(
    model: Model, prompt: Sequence[str] = (), max_tokens: int = 12
) -> AsyncIterator[str]:
    """Programs in three languages go on from each other's KV pages.

    Args:
        prompt: the part of Python, then of C, then of JavaScript; who gets none has one
        max_tokens: how many tokens they go on for
    """
    if len(prompt) > len(PARTS) or not all(prompt):
        raise ArgumentError(f"{len(prompt)} prompts, or an empty one", "give one to three texts")
    if not 1 <= max_tokens <= 512:  # a text has to fit into a message
        raise ArgumentError(f"max_tokens is {max_tokens}", "use 1 to 512")
    parts = PARTS | dict(zip(PARTS, prompt, strict=False))
    topic = get_instance_id()  # what the names of the exports begin with, too
    children: dict[str, Child] = {}
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(subscribe(topic, job=True))
        for language in ("c", "node"):
            words = [language, topic, parts[language], str(max_tokens)]
            child = stack.enter_context(spawn(language, words))
            try:
                await child.id
            except UnavailableError as error:
                yield f"without {language}: {error.message} (try: {error.hint})\n"
            else:
                children[language] = child
        for language, child in children.items():
            await message_of(language, child)  # "ready": it has subscribed

        members = ["python", *children]
        broadcast(topic, " ".join(["start", *members]), job=True)
        found = await asyncio.gather(
            take_part(model, group, parts["python"], max_tokens),
            *(reports(language, child, len(members)) for language, child in children.items()),
        )
        exports = {e.name.removeprefix(f"{topic}/"): e for e in await list_exported(f"{topic}/")}
        for child in children.values():
            child.close()  # all have what they need of each other, and may end
        await gather(*(child.wait() for child in children.values()))

    results = [result for of_one in found for result in of_one]
    yield table(members, exports, results)
    if any(len({r.text for r in results if r.whose == whose}) > 1 for whose in members):
        raise InferletError("the same pages gave different texts", "report this as an error")
    yield "The same pages gave the same text to all.\n"
