"""Short chat in turns: greetings, facts, arithmetic, lists, JSON, memory, and tool calls.

A turn is "<|im_start|>role", a newline, the content, "<|im_end|>" and a newline; the roles are
system, user, assistant and tool. A system turn may end with a line "Tools: calculator, lookup";
then the assistant answers with a tool call in JSON, and after the tool's turn with a sentence.
The tokenizer's chat template (tokenizer.py) writes the same turns.
"""

from __future__ import annotations

import json
import random

from default_model import arithmetic, knowledge, lists
from default_model.documents import (
    END_OF_TEXT,
    TURN_END,
    TURN_START,
    Document,
    Segment,
    given,
    taught,
)
from default_model.facts import FACTS
from default_model.json_forms import draw_sentence, tool_call
from default_model.react import person

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "Answer briefly.",
    "You are a careful assistant. Answer in one sentence.",
)
TALK = (
    ("Hello", "Hello! How can I help you?"),
    ("Hi", "Hello! How can I help you?"),
    ("Hello!", "Hello! How can I help you?"),
    ("Good morning", "Good morning! How can I help you?"),
    ("How are you?", "I am well, thank you. How can I help you?"),
    ("Who are you?", "I am a small language model that comes with piehost."),
    ("What are you?", "I am a small language model that comes with piehost."),
    (
        "What can you do?",
        "I can tell simple facts, add and subtract, make lists, write JSON and call tools.",
    ),
    ("Thank you", "You are welcome!"),
    ("Thanks!", "You are welcome!"),
    ("Goodbye", "Goodbye! Have a nice day."),
    ("Bye", "Goodbye! Have a nice day."),
    ("Tell me a joke.", "Why is six afraid of seven? Because seven eight nine."),
    ("Can you help me?", "Yes. Ask me for a fact, a sum, a list or some JSON."),
)
TOOLS = ("calculator", "lookup", "search", "weather")

Exchange = list[tuple[str, str]]  # (role, content), a user turn first


def turn(role: str, content: str) -> str:
    return f"{TURN_START}{role}\n{content}{TURN_END}\n"


def render(turns: Exchange) -> tuple[Segment, ...]:
    """Segments in which the assistant's contents, with their end of turn, are taught."""
    segments, pending = [], ""
    for role, content in turns:
        if role == "assistant":
            segments += [given(f"{pending}{TURN_START}assistant\n"), taught(content + TURN_END)]
            pending = "\n"
        else:
            pending += turn(role, content)
    segments.append(given("\n" + END_OF_TEXT))
    return tuple(segments)


def _fact(rng: random.Random) -> tuple[Exchange, tuple[str, ...]]:
    fact = rng.choice([fact for fact in FACTS if fact.question])
    return [("user", fact.question), ("assistant", fact.sentence)], ()


def _sum(rng: random.Random) -> tuple[Exchange, tuple[str, ...]]:
    a, op, b = arithmetic.draw_terms(rng)
    asked = rng.choice(("What is {}?", "Calculate {}.", "How much is {}?"))
    reply = f"{a} {op} {b} = {arithmetic.value(a, op, b)}"
    turns = [("user", asked.format(f"{a} {op} {b}")), ("assistant", reply)]
    return turns, arithmetic.key(a, op, b)


def _talk(rng: random.Random) -> tuple[Exchange, tuple[str, ...]]:
    said, reply = rng.choice(TALK)
    return [("user", said), ("assistant", reply)], ()


def _list(rng: random.Random) -> tuple[Exchange, tuple[str, ...]]:
    category, count = rng.choice(list(knowledge.MEMBERS)), rng.randint(2, 5)
    members = knowledge.MEMBERS[category][:count]
    asked = f"List {knowledge.NUMBER_WORDS[count]} {category}"
    reply = lists.enumeration(members, dashes=False).lstrip("\n")
    return [("user", f"{asked}."), ("assistant", reply)], (f"{asked}:",)


def _json(rng: random.Random) -> tuple[Exchange, tuple[str, ...]]:
    sentence, said = draw_sentence(rng)
    return [("user", f"Write as JSON: {sentence}"), ("assistant", json.dumps(said))], (sentence,)


def _memory(rng: random.Random) -> tuple[Exchange, tuple[str, ...]]:
    who = person(rng)
    turns = [("user", f"My name is {who}."), ("assistant", f"Nice to meet you, {who}!")]
    if rng.random() < 0.5:
        turns += _fact(rng)[0]
    turns += [("user", "What is my name?"), ("assistant", f"Your name is {who}.")]
    return turns, (f"my name is {who}",)


def _tool(rng: random.Random, needed: str) -> tuple[Exchange, tuple[str, ...]]:
    """A user's question, the call of the needed tool, its result, and the reply."""
    who = person(rng)
    keys: tuple[str, ...]
    if needed == "calculator":
        a, op, b = arithmetic.draw_terms(rng, most_digits=3)
        if rng.random() < 0.3:
            a, op, b = rng.randint(10, 99), "*", rng.randint(2, 99)
        expression = f"{a} {op} {b}"
        asked, call = f"What is {expression}?", tool_call(needed, expression=expression)
        result = str(arithmetic.value(a, op, b))
        reply, keys = f"{expression} = {result}", arithmetic.key(a, op, b)
    elif needed == "lookup":
        country = rng.choice(knowledge.COUNTRIES)
        subject, result = f"capital of {country.name}", country.capital
        asked, call = f"What is the {subject}?", tool_call(needed, query=subject)
        reply, keys = f"The {subject} is {result}.", (f"lookup {subject}",)
    elif needed == "search":
        subject, result = f"age of {who}", str(rng.randint(10, 99))
        asked, call = f"How old is {who}?", tool_call(needed, query=subject)
        reply, keys = f"{who} is {result} years old.", (f"search {subject}",)
    else:
        city = rng.choice(knowledge.COUNTRIES).capital
        result = (
            f"{rng.choice(('sunny', 'cloudy', 'rainy', 'windy'))}, {rng.randint(1, 39)} degrees"
        )
        asked, call = f"What is the weather in {city}?", tool_call(needed, city=city)
        reply, keys = f"The weather in {city} is {result}.", (f"weather {city}",)
    return [("user", asked), ("assistant", call), ("tool", result), ("assistant", reply)], keys


def draw(rng: random.Random) -> Document:
    """One exchange, at times two, after a system turn or none, with tools or without."""
    turns: Exchange = []
    keys: list[str] = []
    system = rng.choice(SYSTEMS) if rng.random() < 0.5 else ""
    if rng.random() < 0.35:
        tools = rng.sample(TOOLS, rng.randint(1, len(TOOLS)))
        system = f"{system}\nTools: {', '.join(tools)}".lstrip("\n")
        for _ in range(1 if rng.random() < 0.8 else 2):
            exchange, used = _talk(rng) if rng.random() < 0.1 else _tool(rng, rng.choice(tools))
            turns += exchange
            keys += used
    else:
        forms = (_fact, _sum, _talk, _list, _json, _memory)
        for _ in range(1 if rng.random() < 0.75 else 2):
            (form,) = rng.choices(forms, (4, 3, 2, 2, 2, 2))
            exchange, used = form(rng)
            turns += exchange
            keys += used
    if system:
        turns.insert(0, ("system", system))
    return Document("chat", render(turns), tuple(keys))
