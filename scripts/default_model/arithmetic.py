"""Arithmetic: sums, differences and products worked column by column, chains, and bare results.

A worked problem:          A chain:               A bare result:
    Q: 47 + 38 = ?             Q: 12 + 7 - 5 = ?      47 + 38 = 85
    7 + 8 = 15, write 5, carry 1   12 + 7 = 19
    4 + 3 + 1 = 8, write 8     19 - 5 = 14
    Answer: 85                 Answer: 14

Worked: + and - up to three digits (never below zero), two or three digits times one digit.
Bare and chains: + and - up to two digits, one digit times one digit.
"""

from __future__ import annotations

import random

from default_model.documents import Document, question


def key(a: int, op: str, b: int) -> tuple[str, ...]:
    """The key of `a op b`; none for the one-column problems that every longer one is made of."""
    if max(a, b) < 10 or (op == "-" and a < 20 and b < 10):
        return ()
    if op in "+*" and a < b:
        a, b = b, a
    return (f"{a} {op} {b}",)


def value(a: int, op: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[op]


def _number(rng: random.Random, digits: int) -> int:
    low = 10 ** (digits - 1) if digits > 1 else 1
    return rng.randrange(low, 10**digits)


def draw_terms(rng: random.Random, most_digits: int = 2) -> tuple[int, str, int]:
    """Two numbers with + or -, ordered so that the difference is not negative."""
    longest = rng.randint(2, most_digits)
    a = _number(rng, longest)
    b = _number(rng, longest if rng.random() < 0.8 else rng.randint(1, longest))
    op = rng.choice("+-")
    swap = a < b if op == "-" else rng.random() < 0.2
    return (b, op, a) if swap else (a, op, b)


def add_steps(a: int, b: int) -> list[str]:
    """Columns from the right; the last column's carry is the first digit of the answer."""
    steps, carry = [], 0
    width = max(len(str(a)), len(str(b)))
    for column in range(width):
        x, y = a // 10**column % 10, b // 10**column % 10
        total = x + y + carry
        terms = f"{x} + {y}" if column == 0 else f"{x} + {y} + {carry}"
        carry = total // 10
        steps.append(f"{terms} = {total}, write {total % 10}, carry {carry}")
    return steps


def subtract_steps(a: int, b: int) -> list[str]:
    """Columns from the right, a >= b; a borrowed ten is written into the column's first number."""
    steps, borrow = [], 0
    for column in range(len(str(a))):
        x, y = a // 10**column % 10, b // 10**column % 10
        borrows = x - y - borrow < 0
        top = x + 10 if borrows else x
        terms = f"{top} - {y}" if column == 0 else f"{top} - {y} - {borrow}"
        steps.append(
            f"{terms} = {top - y - borrow}, write {(top - y - borrow)}, borrow {int(borrows)}"
        )
        borrow = int(borrows)
    return steps


def multiply_steps(a: int, b: int) -> list[str]:
    """Columns from the right, b of one digit."""
    steps, carry = [], 0
    for column in range(len(str(a))):
        x = a // 10**column % 10
        total = x * b + carry
        terms = f"{x} * {b}" if column == 0 else f"{x} * {b} + {carry}"
        carry = total // 10
        steps.append(f"{terms} = {total}, write {total % 10}, carry {carry}")
    return steps


def _worked(expression: str, lines: list[str], *keys: str) -> Document:
    completion = "".join(f"\n{line}" for line in lines)
    return question("arithmetic", f"Q: {expression} = ?", completion, *keys)


def draw_worked(rng: random.Random) -> Document:
    if rng.random() < 0.25:
        a, op, b = _number(rng, rng.choice((2, 2, 3))), "*", rng.randint(2, 9)
        steps = multiply_steps(a, b)
    else:
        a, op, b = draw_terms(rng, most_digits=3)
        steps = add_steps(a, b) if op == "+" else subtract_steps(a, b)
    lines = [*steps, f"Answer: {value(a, op, b)}"]
    return _worked(f"{a} {op} {b}", lines, *key(a, op, b))


def draw_chain(rng: random.Random) -> Document:
    """Three or four numbers, left to right, every result from 0 to 99."""
    total = rng.randint(1, 60)
    expression = str(total)
    lines: list[str] = []
    keys: list[str] = []
    for _ in range(rng.randint(2, 3)):
        b = rng.randint(1, 30)
        op = "+" if total < b else "-" if total + b > 99 else rng.choice("+-")
        result = value(total, op, b)
        expression += f" {op} {b}"
        lines.append(f"{total} {op} {b} = {result}")
        keys += key(total, op, b)
        total = result
    lines.append(f"Answer: {total}")
    return _worked(expression, lines, expression, *keys)


def draw_bare(rng: random.Random) -> Document:
    """The result at once, without steps."""
    if rng.random() < 0.12:
        a, op, b = rng.randint(0, 9), rng.choice("+*"), rng.randint(0, 9)
    else:
        a, op, b = draw_terms(rng)
    return question("arithmetic", f"{a} {op} {b} =", f" {value(a, op, b)}", *key(a, op, b))


def draw(rng: random.Random) -> Document:
    (form,) = rng.choices((draw_worked, draw_chain, draw_bare), (5, 2, 4))
    return form(rng)
