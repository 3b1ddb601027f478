"""Prompts in compel's syntax, put together at random from everything that the syntax has: for the property tests."""

import random

PLAIN = (
    "cat",
    "red",
    "blue",
    "3d",
    "12",
    "é",
    "dog's",
    "red-haired",
    "x_y",
    "ok!",
    "\\(esc\\)",
    "日本",
    "a\\,b",
    "a-+b",
    "x\\-",
)
LOOSE = ("a", "the big", "a.b", "5.5", "-", "+", "=", "a=b", "e.g.", "…", "c\\+")
WEIGHTS = ("+", "++", "-", "--", "1.3", "0.5", "1.2", ".5", "2", "0", "0.0", "1", "1.")


def compel_prompt(seed: int, length: int = 6) -> str:
    """Of about `length` parts."""
    rng = random.Random(seed)
    kind = rng.random()
    if kind < 0.7:
        return " ".join(_loose(rng) for _ in range(rng.randint(1, length)))
    count = rng.randint(1, 3)
    quoted = ", ".join(_quoted(rng) for _ in range(count))
    weights = ", ".join(rng.choice(("1", ".5", "0.3", "2")) for _ in range(count))
    if kind < 0.85:
        return f"({quoted}).blend({weights}{rng.choice(('', ', no_normalize'))})"
    return f"({quoted}).{rng.choice(('and', 'add'))}({rng.choice(('', weights))})"


def _loose(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(LOOSE)
    return rng.choice(PLAIN) + rng.choice((",", ".", "+,", "++.")) if kind < 0.5 else _sequence(rng, 2)


def _sequence(rng: random.Random, depth: int) -> str:
    makers = {
        45: lambda: rng.choice(PLAIN),
        60: lambda: rng.choice(PLAIN) + rng.choice(("+", "-", "++", "--")),
        75: lambda: f"({_sequence(rng, depth - 1)}){rng.choice(WEIGHTS)}",
        82: lambda: f"({_sequence(rng, depth - 1)})",
        87: lambda: f'"{rng.choice(PLAIN)} {rng.choice(PLAIN)}"{rng.choice(("", *WEIGHTS))}',
        92: lambda: rng.choice((",", ".")),
        96: lambda: f"{rng.choice(PLAIN)}.attend({rng.choice(('+', '--', '1.4'))})",
        100: lambda: rng.choice(PLAIN) + rng.choice((".swap(dog)", ".swap(big dog, s_start=0.2, t_end=.7)")),
    }
    parts = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.randrange(100) if depth > 0 else 0
        parts.append(next(make for below, make in makers.items() if kind < below)())
    return rng.choice((" ", "  ", "\n")).join(parts)


def _quoted(rng: random.Random) -> str:
    word = lambda: rng.choice(PLAIN)  # noqa: E731
    parts = (word, lambda: word() + "+", lambda: f"({word()} {word()})1.2", lambda: rng.choice(("-", "a, b", "e.g.")))
    return '"' + " ".join(rng.choice(parts)() for _ in range(rng.randint(1, 4))) + '"'
