"""JSON: a sentence turned into an object, and a request turned into a tool call.

Text: Anna is 31 years old and lives in Oslo.
JSON: {"name": "Anna", "age": 31, "city": "Oslo"}

Text: Anna is 31 years old and lives in Oslo.
Keys: city, name
JSON: {"city": "Oslo", "name": "Anna"}

Request: What is 47 + 38?
Call: {"name": "calculator", "arguments": {"expression": "47 + 38"}}
"""

from __future__ import annotations

import json
import random
from typing import Any

from default_model import arithmetic, knowledge
from default_model.documents import Document, question
from default_model.react import person


def tool_call(name: str, **arguments: str) -> str:
    return json.dumps({"name": name, "arguments": arguments})


def draw_sentence(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A sentence and what it says, in the order it says it."""
    who, city = person(rng), rng.choice(knowledge.COUNTRIES).capital
    count, price = rng.randint(2, 99), rng.randint(2, 99)
    thing, color = rng.choice(knowledge.THINGS), rng.choice(knowledge.MEMBERS["colors"])
    day, job = rng.choice(knowledge.DAYS), rng.choice(knowledge.MEMBERS["jobs"])
    hour, glad = rng.randint(1, 12), rng.random() < 0.5
    forms: list[tuple[str, dict[str, Any]]] = [
        (
            f"{who} is {count} years old and lives in {city}.",
            {"name": who, "age": count, "city": city},
        ),
        (
            f"{who} works as a {job} in {city}.",
            {"name": who, "job": job, "city": city},
        ),
        (
            f"{who} ordered {count} {thing} for {price} dollars.",
            {"name": who, "item": thing, "count": count, "price": price},
        ),
        (
            f"The meeting with {who} is on {day} at {hour} in {city}.",
            {"name": who, "day": day, "hour": hour, "city": city},
        ),
        (
            f"There are {count} {color} {thing} in the shop.",
            {"item": thing, "color": color, "count": count},
        ),
        (
            f"It is {count} degrees in {city} on {day}.",
            {"city": city, "day": day, "degrees": count},
        ),
        (
            f"{who} bought the {thing} and was {'happy' if glad else 'not happy'}.",
            {"name": who, "item": thing, "happy": glad},
        ),
        (
            f"{who} likes {color} and {thing}.",
            {"name": who, "likes": [color, thing]},
        ),
    ]
    return rng.choice(forms)


def draw_extraction(rng: random.Random) -> Document:
    sentence, said = draw_sentence(rng)
    prompt = f"Text: {sentence}\n"
    if rng.random() < 0.4:
        names = rng.sample(list(said), rng.randint(1, len(said)))
        said = {name: said[name] for name in names}
        prompt += f"Keys: {', '.join(names)}\n"
    return question("json", prompt + "JSON:", f" {json.dumps(said)}", sentence)


def draw_request(rng: random.Random) -> tuple[str, str, tuple[str, ...]]:
    """A request, the tool call that serves it, and its keys."""
    form = rng.randrange(5)
    city = rng.choice(knowledge.COUNTRIES).capital
    if form <= 1:
        if rng.random() < 0.3:
            a, op, b = rng.randint(10, 99), "*", rng.randint(2, 99)
        else:
            a, op, b = arithmetic.draw_terms(rng, most_digits=3)
        expression = f"{a} {op} {b}"
        asked = rng.choice(("What is {}?", "Calculate {}.", "How much is {}?"))
        call = tool_call("calculator", expression=expression)
        return asked.format(expression), call, arithmetic.key(a, op, b)
    if form == 2:
        subject = f"capital of {rng.choice(knowledge.COUNTRIES).name}"
        asked = f"What is the {subject}?"
        return asked, tool_call("lookup", query=subject), (f"lookup {subject}",)
    if form == 3:
        who = person(rng)
        subject = f"age of {who}"
        return f"How old is {who}?", tool_call("search", query=subject), (f"search {subject}",)
    asked = f"What is the weather in {city}?"
    return asked, tool_call("weather", city=city), (f"weather {city}",)


def draw_call(rng: random.Random) -> Document:
    asked, call, keys = draw_request(rng)
    return question("json", f"Request: {asked}\nCall:", f" {call}", *keys)


def draw(rng: random.Random) -> Document:
    return draw_call(rng) if rng.random() < 0.35 else draw_extraction(rng)
