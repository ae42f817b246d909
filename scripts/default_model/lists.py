"""Lists: enumerations, outlines to be filled in parallel, and questions split into parts.

    List three fruits:            List two birds with dashes:     Count from 3 to 6:
    1. plum                       - owl                           3, 4, 5, 6
    2. apple                      - swan
    3. mango

    Topic: cats                   Topic: cats                     Question: What are the capitals of
    Outline:                      Point: What cats eat            France and Japan?
    1. Where cats live            Detail: Cats eat fish and       Parts:
    2. What cats eat              meat.                           1. What is the capital of France?
    3. How young cats are called                                  2. What is the capital of Japan?

The members of an enumeration are free; `is_enumeration` says whether a list is right.
"""

from __future__ import annotations

import random
import re

from default_model import knowledge
from default_model.documents import Document, question
from default_model.facts import article, start

POINTS = ("Where {} live", "What {} eat", "How young {} are called")
_ASKED = re.compile(r"List (\w+) (\w+)( with dashes)?:")


def enumeration(members: list[str], dashes: bool) -> str:
    return "".join(
        f"\n{'-' if dashes else f'{i}.'} {member}" for i, member in enumerate(members, start=1)
    )


def is_enumeration(prompt: str, completion: str) -> bool | None:
    """Whether the completion lists what the prompt asks; None when it asks for something else."""
    asked = _ASKED.fullmatch(prompt)
    if asked is None:
        return None
    count, category, dashes = asked.groups()
    lines = completion.strip("\n").split("\n")
    members = [line.split(" ", 1)[-1] for line in lines]
    return (
        completion == enumeration(members, bool(dashes))
        and len(members) == knowledge.NUMBER_WORDS.index(count)
        and len(set(members)) == len(members)
        and set(members) <= set(knowledge.MEMBERS[category])
    )


def draw_enumeration(rng: random.Random) -> Document:
    category = rng.choice(list(knowledge.MEMBERS))
    count, dashes = rng.randint(2, 6), rng.random() < 0.4
    members = rng.sample(knowledge.MEMBERS[category], count)
    prompt = f"List {knowledge.NUMBER_WORDS[count]} {category}{' with dashes' if dashes else ''}:"
    return question("lists", prompt, enumeration(members, dashes), prompt)


def draw_in_order(rng: random.Random) -> Document:
    """An enumeration in the table's order from a random member on, so that none comes twice."""
    category = rng.choice(list(knowledge.MEMBERS))
    count, dashes = rng.randint(2, 6), rng.random() < 0.4
    members = knowledge.MEMBERS[category]
    first = rng.randrange(len(members))
    chosen = (members[first:] + members[:first])[:count]
    prompt = f"List {knowledge.NUMBER_WORDS[count]} {category}{' with dashes' if dashes else ''}:"
    return question("lists", prompt, enumeration(chosen, dashes), prompt)


def draw_count(rng: random.Random) -> Document:
    first = rng.randint(0, 95)
    last = first + rng.randint(2, 9)
    prompt = f"Count from {first} to {last}:"
    return question("lists", prompt, f"\n{', '.join(map(str, range(first, last + 1)))}", prompt)


def draw_outline(rng: random.Random) -> Document:
    plural = rng.choice(knowledge.ANIMALS).plural
    points = [point.format(plural) for point in POINTS]
    return question(
        "lists", f"Topic: {plural}\nOutline:", enumeration(points, False), f"outline {plural}"
    )


def draw_detail(rng: random.Random) -> Document:
    """One point of an outline; a fact, so never held out."""
    animal = rng.choice(knowledge.ANIMALS)
    form = rng.randrange(3)
    detail = (
        f"{start(animal.plural)} live in {animal.home}.",
        f"{start(animal.plural)} eat {animal.food}.",
        f"A young {animal.name} is called {article(animal.young)}.",
    )[form]
    point = POINTS[form].format(animal.plural)
    return question("lists", f"Topic: {animal.plural}\nPoint: {point}\nDetail:", f" {detail}")


def draw_parts(rng: random.Random) -> Document:
    names = [country.name for country in rng.sample(knowledge.COUNTRIES, rng.randint(2, 3))]
    told = ", ".join(names[:-1]) + f" and {names[-1]}"
    noun = rng.choice(("capital", "language", "population"))
    parts = [f"What is the {noun} of {name}?" for name in names]
    prompt = f"Question: What are the {noun}s of {told}?\nParts:"
    return question("lists", prompt, enumeration(parts, False), prompt)


def draw(rng: random.Random) -> Document:
    forms = (draw_enumeration, draw_count, draw_outline, draw_detail, draw_parts)
    (form,) = rng.choices(forms, (5, 1, 1, 2, 2))
    return form(rng)
