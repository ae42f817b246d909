"""ReAct traces: a question, then thoughts, actions and observations until a final answer.

    Question: What is 47 + 38?
    Thought: I need to calculate 47 + 38.
    Action: calculator[47 + 38]
    Observation: 85
    Thought: The result is 85.
    Final Answer: 85

Tools: calculator[expression], lookup[a fact], search[something about a person or a shop]. The
model writes up to "Observation:"; the runtime writes " ", the tool's answer and a newline.
"""

from __future__ import annotations

import random

from default_model import arithmetic, knowledge
from default_model.documents import END_OF_TEXT, Document, Segment, given, taught


def person(rng: random.Random) -> str:
    """A first name: mostly one of the known ones, else made of syllables."""
    if rng.random() < 0.7:
        return rng.choice(knowledge.PEOPLE)
    return "".join(rng.choice(knowledge.SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize()


def trace(
    asked: str, rounds: list[tuple[str, str, str]], thought: str, answer: str
) -> list[Segment]:
    """rounds: (thought, action, observation) in order; then the last thought and the answer."""
    segments = [given(f"Question: {asked}")]
    for i, (why, action, observation) in enumerate(rounds):
        newline = "\n" if i == 0 else ""
        segments += [
            taught(f"{newline}Thought: {why}\nAction: {action}\nObservation:"),
            given(f" {observation}\n"),
        ]
    segments.append(taught(f"Thought: {thought}\nFinal Answer: {answer}{END_OF_TEXT}"))
    return segments


def _calculation(a: int, op: str, b: int) -> tuple[str, str, str]:
    expression = f"{a} {op} {b}"
    return (
        f"I need to calculate {expression}.",
        f"calculator[{expression}]",
        str(arithmetic.value(a, op, b)),
    )


def _document(
    asked: str, rounds: list[tuple[str, str, str]], thought: str, answer: str, *keys: str
) -> Document:
    return Document("react", tuple(trace(asked, rounds, thought, answer)), keys)


def draw_calculation(rng: random.Random) -> Document:
    if rng.random() < 0.3:
        a, op, b = rng.randint(10, 999), "*", rng.randint(2, 99)
    else:
        a, op, b = arithmetic.draw_terms(rng, most_digits=4)
    asked = rng.choice(("What is {}?", "Calculate {}.", "How much is {}?"))
    result = arithmetic.value(a, op, b)
    return _document(
        asked.format(f"{a} {op} {b}"),
        [_calculation(a, op, b)],
        f"The result is {result}.",
        str(result),
        *arithmetic.key(a, op, b),
    )


def draw_story(rng: random.Random) -> Document:
    """A word problem with one calculation."""
    who, things = person(rng), rng.choice(knowledge.THINGS)
    form = rng.randrange(4)
    if form == 0:
        a, op, b = rng.randint(10, 99), "+", rng.randint(2, 99)
        asked = f"{who} has {a} {things} and buys {b} more. How many {things} does {who} have?"
    elif form == 1:
        b = rng.randint(2, 80)
        a, op = rng.randint(b + 1, 99), "-"
        asked = f"{who} has {a} {things} and sells {b}. How many {things} are left?"
    elif form == 2:
        a, op, b = rng.randint(2, 40), "*", rng.randint(2, 20)
        asked = f"{who} buys {a} {things} at {b} dollars each. How many dollars is that?"
    else:
        a, op, b = rng.randint(2, 40), "*", rng.randint(2, 20)
        asked = f"There are {a} boxes with {b} {things} each. How many {things} are there?"
    result = arithmetic.value(a, op, b)
    return _document(
        asked,
        [_calculation(a, op, b)],
        f"The result is {result}.",
        str(result),
        f"story {form} {who} {things}",
        *arithmetic.key(a, op, b),
    )


def draw_lookup(rng: random.Random) -> Document:
    """A fact the tool knows; the answer is whatever the tool says."""
    form = rng.randrange(4)
    if form == 0:
        country = rng.choice(knowledge.COUNTRIES)
        subject, answer = f"capital of {country.name}", country.capital
        asked = f"What is the {subject}?"
    elif form == 1:
        name, symbol, number = rng.choice(knowledge.ELEMENTS)
        subject, answer = rng.choice(
            ((f"symbol of {name}", symbol), (f"atomic number of {name}", str(number)))
        )
        asked = f"What is the {subject}?"
    elif form == 2:
        country = rng.choice(knowledge.COUNTRIES)
        subject, answer = f"population of {country.name}", f"{rng.randint(1, 999)} million"
        asked = f"What is the {subject}?"
    else:
        country = rng.choice(knowledge.COUNTRIES)
        subject, answer = f"language of {country.name}", country.language
        asked = f"Which language do people speak in {country.name}?"
    if rng.random() < 0.2:  # teach to believe the tool, not the memory
        answer = rng.choice(knowledge.COUNTRIES).capital if form == 0 else answer
    return _document(
        asked,
        [(f"I need to look up the {subject}.", f"lookup[{subject}]", answer)],
        f"The lookup says {answer}.",
        answer,
        f"lookup {subject}",
    )


def draw_search(rng: random.Random) -> Document:
    """Something only a search can tell, once alone and once with a sum on top."""
    who = person(rng)
    if rng.random() < 0.4:
        item, price = rng.choice(knowledge.THINGS), rng.randint(2, 99)
        subject, answer = f"price of {item}", str(price)
        found = f"The price of {item} is {price} dollars."
        asked = f"What is the price of {item} in the shop of {who}?"
        subject = f"{subject} in the shop of {who}"
    elif rng.random() < 0.5:
        age = rng.randint(10, 99)
        subject, answer = f"age of {who}", str(age)
        found, asked = f"{who} is {age} years old.", f"How old is {who}?"
    else:
        city = rng.choice(knowledge.COUNTRIES).capital
        subject, answer = f"home of {who}", city
        found, asked = f"{who} lives in {city}.", f"Where does {who} live?"
    rounds = [(f"I need to search for the {subject}.", f"search[{subject}]", found)]
    return _document(asked, rounds, f"The search says {answer}.", answer, f"search {subject}")


def draw_two_rounds(rng: random.Random) -> Document:
    """A search, then a calculation with what it found."""
    who, age, b = person(rng), rng.randint(20, 70), rng.randint(2, 19)
    op = rng.choice("+-")
    asked = (
        f"How old will {who} be in {b} years?" if op == "+" else f"How old was {who} {b} years ago?"
    )
    result = arithmetic.value(age, op, b)
    rounds = [
        (
            f"I need to search for the age of {who}.",
            f"search[age of {who}]",
            f"{who} is {age} years old.",
        ),
        _calculation(age, op, b),
    ]
    return _document(
        asked,
        rounds,
        f"The result is {result}.",
        str(result),
        f"search age of {who}",
        *arithmetic.key(age, op, b),
    )


def draw(rng: random.Random) -> Document:
    forms = (draw_calculation, draw_story, draw_lookup, draw_search, draw_two_rounds)
    (form,) = rng.choices(forms, (4, 3, 2, 2, 2))
    return form(rng)
