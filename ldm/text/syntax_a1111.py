r"""AUTOMATIC1111's prompt syntax: `(x)` is 1.1, `[x]` 1/1.1, `(x:1.3)` that weight; nesting multiplies; BREAK begins a window.

`\(`, `\)`, `\[`, `\]` and `\\` stand for themselves. That interface takes a bracket that
is not closed for one that is closed at the end, and one that was never opened for text; here both are errors, with their
position. What it has beyond weights, prompts that change between steps and `AND`, is refused by name.
"""

import re

from ldm.text.prompt import Fragment, Passage, Prompt, PromptError, joined

ROUND, SQUARE = 1.1, 1 / 1.1
TOKEN = re.compile(
    r"\\[()\[\]\\]|[()\[\]]|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|\s*\bBREAK\b\s*|(?P<and>\bAND\b)|\\|:|.", re.DOTALL
)
SCHEDULED = re.compile(r"\[[^\[\]()]*(?:\||:[^\[\]():]*\d\s*\])")


def parse(text: str) -> Prompt:
    """Read a prompt: a passage for each window that BREAK begins. Raises PromptError, naming the position."""
    if found := SCHEDULED.search(text):
        raise _error(found.start(), "prompts that change between steps, [a:b:0.5] and [a|b], are not supported; write one")
    passages: list[list[Fragment]] = [[]]
    opened: list[tuple[str, int, int, int]] = []  # bracket, its position, the passage and the fragment after it

    def weigh(since: tuple[str, int, int, int], weight: float) -> None:
        for number in range(since[2], len(passages)):
            for i in range(since[3] if number == since[2] else 0, len(passages[number])):
                fragment = passages[number][i]
                passages[number][i] = Fragment(fragment.text, fragment.weight * weight)

    for found in TOKEN.finditer(text):
        piece, at = found.group(), found.start()
        if piece in ("(", "["):
            opened.append((piece, at, len(passages) - 1, len(passages[-1])))
        elif piece in (")", "]") or (found["weight"] and opened and opened[-1][0] == "("):
            bracket = "[" if piece == "]" else "("
            if not opened or opened[-1][0] != bracket:
                raise _error(at, f"unexpected {piece}; no {bracket} is open here; write \\{piece} where it is text")
            weigh(opened.pop(), float(found["weight"]) if found["weight"] else ROUND if bracket == "(" else SQUARE)
        elif found["weight"]:
            raise _error(found.end() - 1, "unexpected ); no ( is open here; write \\) where it is text")
        elif found["and"]:
            raise _error(at, "AND, which adds pictures up, is not supported; write it in small letters")
        elif piece.strip() == "BREAK":
            passages.append([])
        else:
            passages[-1].append(Fragment(piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece))
    if opened:
        bracket, at, *_ = opened[-1]
        raise _error(at, f"the {bracket} is not closed; close it, or write \\{bracket} for a bracket that is text")
    if len(passages) > 1 and not passages[-1]:
        passages.pop()  # a BREAK at the end begins nothing
    parts = tuple(Passage(joined(passage, "") or (Fragment(""),)) for passage in passages)
    return Prompt(parts, (1.0,) * len(parts))


def _error(at: int, what: str) -> PromptError:
    return PromptError(f"position {at + 1}: {what}")
