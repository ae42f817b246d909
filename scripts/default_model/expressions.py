"""Python: expressions with their values, and code actions whose output answers a task.

    >>> [x * 2 for x in [1, 2, 3]]          Task: Add 12, 7 and 5.
    [2, 4, 6]                               Code: print(12 + 7 + 5)
                                            Output: 24
                                            Answer: 24

In a code action the model writes up to "Output:"; the runtime writes " ", what the code printed
and a newline. Every value is computed by Python itself.
"""

from __future__ import annotations

import random

from default_model import arithmetic, knowledge
from default_model.documents import END_OF_TEXT, Document, given, question, taught

WORDS = sorted(
    {word for members in knowledge.MEMBERS.values() for word in members if word.islower()}
)


def _numbers(rng: random.Random, low: int = 2, high: int = 5, top: int = 9) -> list[int]:
    return [rng.randint(1, top) for _ in range(rng.randint(low, high))]


def draw_expression(rng: random.Random) -> Document:
    """One expression; its text is its key."""
    xs, word, other = _numbers(rng), rng.choice(WORDS), rng.choice(WORDS)
    n, form = rng.randint(2, 9), rng.randrange(15)
    if form == 0:
        a, op, b = arithmetic.draw_terms(rng)
        result, keys = str(arithmetic.value(a, op, b)), arithmetic.key(a, op, b)
        return question("python", f">>> {a} {op} {b}", f"\n{result}", *keys)
    expression = {
        1: f"len({xs})",
        2: f"max({xs})",
        3: f"min({xs})",
        4: f"sorted({rng.sample(range(1, 10), rng.randint(3, 5))})",
        5: f"[x * {min(n, 5)} for x in {xs}]",
        6: f"[x + {n} for x in {xs}]",
        7: f"list(range({n}))",
        8: f"{xs} + {_numbers(rng, 1, 3)}",
        9: f"{xs}[{rng.randrange(len(xs))}]",
        10: f"len({word!r})",
        11: f"{word!r} + {other!r}",
        12: f"{word!r} == {(word if rng.random() < 0.5 else other)!r}",
        13: f"{n} in {xs}",
        14: f"{rng.randint(1, 99)} {rng.choice('<>')} {rng.randint(1, 99)}",
    }[form]
    keys = () if form == 10 else (expression,)  # the lengths of single words are taught
    result = repr(eval(expression, {"__builtins__": {}}, _BUILTINS))
    return question("python", f">>> {expression}", f"\n{result}", *keys)


_BUILTINS = {"len": len, "max": max, "min": min, "sorted": sorted, "list": list, "range": range}


def draw_code_action(rng: random.Random) -> Document:
    xs = [rng.randint(1, 99) for _ in range(rng.randint(2, 4))]
    word = rng.choice(WORDS)
    told = ", ".join(map(str, xs[:-1])) + f" and {xs[-1]}"
    a, b = rng.randint(2, 99), rng.randint(2, 20)
    task, code, output = rng.choice(
        (
            (f"Add {told}.", f"print({' + '.join(map(str, xs))})", str(sum(xs))),
            (f"Find the largest of {told}.", f"print(max({xs}))", str(max(xs))),
            (f"Find the smallest of {told}.", f"print(min({xs}))", str(min(xs))),
            (f"Sort {told}.", f"print(sorted({xs}))", str(sorted(xs))),
            (f"Multiply {a} by {b}.", f"print({a} * {b})", str(a * b)),
            (f"Count the letters of {word}.", f"print(len({word!r}))", str(len(word))),
            (f"Write {word} in capitals.", f"print({word!r}.upper())", word.upper()),
        )
    )
    segments = (
        given(f"Task: {task}"),
        taught(f"\nCode: {code}\nOutput:"),
        given(f" {output}\n"),
        taught(f"Answer: {output}{END_OF_TEXT}"),
    )
    return Document("python", segments, (task,))


def draw(rng: random.Random) -> Document:
    return draw_code_action(rng) if rng.random() < 0.3 else draw_expression(rng)
