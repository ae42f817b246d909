"""Facts: capitals, continents, animals, colors, opposites, elements, orders of days and months.

A fact is a sentence cut in two ("The capital of France is" / " Paris.") with, for most, a question
wording. All facts are taught; the score asks each of them in its sentence wording.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from default_model import knowledge as k
from default_model.documents import END_OF_TEXT, Document, given, taught


@dataclass(frozen=True)
class Fact:
    """topic groups the facts told together; stem + " " + answer + "." is the sentence."""

    topic: str
    stem: str
    answer: str
    question: str = ""

    @property
    def sentence(self) -> str:
        return f"{self.stem} {self.answer}."


def start(text: str) -> str:
    """Capitalise the first letter only."""
    return text[0].upper() + text[1:]


def article(noun: str) -> str:
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def _countries() -> list[Fact]:
    facts = []
    for c in k.COUNTRIES:
        facts += [
            Fact(
                c.name,
                f"The capital of {c.name} is",
                c.capital,
                f"What is the capital of {c.name}?",
            ),
            Fact(c.name, f"{start(c.name)} is in", c.continent, f"Where is {c.name}?"),
            Fact(
                c.name,
                f"People in {c.name} speak",
                c.language,
                f"What language do people speak in {c.name}?",
            ),
        ]
        if c.capital != c.name:
            facts.append(
                Fact(
                    c.name,
                    f"{c.capital} is the capital of",
                    c.name,
                    f"{c.capital} is the capital of which country?",
                )
            )
    return facts


def _animals() -> list[Fact]:
    facts = []
    for a in k.ANIMALS:
        facts += [
            Fact(a.name, f"{start(a.plural)} live in", a.home, f"Where do {a.plural} live?"),
            Fact(a.name, f"{start(a.plural)} eat", a.food, f"What do {a.plural} eat?"),
            Fact(
                a.name,
                f"A young {a.name} is called",
                article(a.young),
                f"What is a young {a.name} called?",
            ),
        ]
        if a.sound:
            facts.append(
                Fact(
                    a.name,
                    f"The sound of {article(a.name)} is",
                    f"a {a.sound}",
                    f"What is the sound of {article(a.name)}?",
                )
            )
    return facts


def _words() -> list[Fact]:
    facts = []
    for one, other in k.OPPOSITES:
        for a, b in ((one, other), (other, one)):
            if a == "right":  # it has two opposites
                continue
            facts.append(
                Fact(a, f"The opposite of {a} is", b, f"What is the opposite of {a}?"),
            )
    for thing, color in k.COLORS:
        facts.append(Fact(thing, f"The color of {thing} is", color, f"What color is {thing}?"))
    for value, word in enumerate(k.NUMBER_WORDS):
        facts.append(
            Fact(word, f"The number {value} is written", word, f"How is {value} written in words?")
        )
    return facts


def _science() -> list[Fact]:
    facts = []
    for name, symbol, number in k.ELEMENTS:
        facts += [
            Fact(name, f"The symbol of {name} is", symbol, f"What is the symbol of {name}?"),
            Fact(
                name,
                f"The atomic number of {name} is",
                str(number),
                f"What is the atomic number of {name}?",
            ),
        ]
    for shape, sides in k.SHAPES:
        facts.append(
            Fact(shape, f"A {shape} has", f"{sides} sides", f"How many sides has a {shape}?")
        )
    for animal, legs in k.LEGS:
        facts.append(
            Fact(
                f"legs {animal}",
                f"{start(animal)} has",
                f"{legs} legs",
                f"How many legs has {animal}?",
            )
        )
    facts += [Fact(stem, stem, answer) for stem, answer in k.GENERAL]
    return facts


def _orders() -> list[Fact]:
    facts = []
    for names, unit in ((k.DAYS, "day"), (k.MONTHS, "month")):
        for i, name in enumerate(names):
            following, earlier = names[(i + 1) % len(names)], names[i - 1]
            facts += [
                Fact(
                    name,
                    f"The {unit} after {name} is",
                    following,
                    f"Which {unit} comes after {name}?",
                ),
                Fact(
                    name,
                    f"The {unit} before {name} is",
                    earlier,
                    f"Which {unit} comes before {name}?",
                ),
            ]
    for names, noun in ((k.MONTHS, "month of the year"), (k.PLANETS, "planet from the Sun")):
        for ordinal, name in zip(k.ORDINALS, names, strict=False):
            facts.append(
                Fact(name, f"The {ordinal} {noun} is", name, f"What is the {ordinal} {noun}?")
            )
    return facts


FACTS: list[Fact] = _countries() + _animals() + _words() + _science() + _orders()

_BY_TOPIC: dict[str, list[Fact]] = {}
for _fact in FACTS:
    _BY_TOPIC.setdefault(_fact.topic, []).append(_fact)


def draw_story(rng: random.Random) -> Document:
    """A few sentences that begin as stories do and keep to the facts; never scored."""
    animal, who = rng.choice(k.ANIMALS), rng.choice(k.PEOPLE)
    color, other = rng.choice(k.MEMBERS["colors"]), rng.choice(k.ANIMALS)
    middle = rng.choice(
        (
            f"Every day {who} ate {animal.food}.",
            f"{who} loved {color} flowers.",
            f"Like all {animal.plural}, {who} lived in {animal.home}.",
        )
    )
    return Document(
        "facts",
        (
            given("Once upon a time"),
            taught(
                f", there was {article(animal.name)} named {who}. {middle} "
                f"One day {who} met {article(other.name)}. They became friends and "
                f"played together all day.{END_OF_TEXT}"
            ),
        ),
    )


def draw_asked(rng: random.Random, fact: Fact) -> Document:
    """The fact's question, after "Q:" or bare."""
    if rng.random() < 0.7:
        prompt, reply = f"Q: {fact.question}\nA:", f" {start(fact.answer)}"
    else:
        prompt, reply = fact.question, f"\n{fact.sentence}"
    return Document("facts", (given(prompt), taught(reply + END_OF_TEXT)))


def draw(rng: random.Random) -> Document:
    """A fact asked, or told with up to two more facts of its topic; at times a story."""
    if rng.random() < 0.04:
        return draw_story(rng)
    fact = rng.choice(FACTS)
    if fact.question and rng.random() < 0.45:
        return draw_asked(rng, fact)
    others = [other for other in _BY_TOPIC[fact.topic] if other.answer != fact.answer]
    told = rng.sample(others, min(len(others), rng.choice((0, 1, 2, 2))))
    rest = "".join(f" {other.sentence}" for other in told)
    return Document(
        "facts",
        (given(fact.stem), taught(f" {fact.answer}."), taught(rest + END_OF_TEXT)),
    )


def problem(fact: Fact) -> Document:
    """The fact in its sentence wording; what follows the sentence is not scored."""
    return Document("facts", (given(fact.stem), taught(f" {fact.answer}.")))
