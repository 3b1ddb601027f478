"""Tokens that have weights, laid into windows of the text encoder's length.

A window is a start mark, room for length - 2 tokens, an end mark, and end marks to fill, as every prompt is. A text longer
than that is cut, or goes on in further windows, by one of these ways of dividing it:

    "cut"        one window; the rest is reported and dropped
    "windows"    every length - 2 tokens, wherever that falls
    "sentences"  after the last full stop that fits, or else the last , . ; or :, or else the last word (compel's default)
    "commas"     after the last comma, where that leaves at most 20 places empty (AUTOMATIC1111's default); and a textual
                 inversion of several vectors goes whole into the next window
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ldm.text.prompt import Fragment
from ldm.text.tokenizer import Tokenizer

COMMA_REACH = 20  # places that A1111 leaves empty, at the most, to divide at a comma


@dataclass(frozen=True)
class Laid:
    """Windows one after another: token ids, weights (1 for marks), and for each fragment its first and last place, both
    included, or None where none of it is there. `cut_off` is the text that did not fit."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    spans: tuple[tuple[int, int] | None, ...]
    cut_off: str


def lay(tokenizer: Tokenizer, fragments: Sequence[Fragment], long_prompt: str) -> Laid:
    """Lay fragments out, each split into tokens by itself."""
    room, ids, weights, owners = tokenizer.length - 2, [], [], []
    for number, fragment in enumerate(fragments):
        tokens = tokenizer.tokens(fragment.text)[1]
        ids += [token.id for token in tokens]
        weights += [fragment.weight] * len(tokens)
        owners += [number] * len(tokens)
    cut_off = ""
    if long_prompt == "cut":
        cut_off = _cut_off(tokenizer, fragments, room)
        ids, weights = ids[:room], weights[:room]
    divide = DIVISIONS[long_prompt]

    laid_ids: list[int] = []
    laid_weights: list[float] = []
    places: list[int] = []  # of each token
    while True:
        count = len(ids) if len(ids) <= room else divide(ids, room, tokenizer)
        places += [len(laid_ids) + 1 + i for i in range(count)]
        fill = tokenizer.length - 1 - count
        laid_ids += [tokenizer.start, *ids[:count], *[tokenizer.end] * fill]
        laid_weights += [1.0, *weights[:count], *[1.0] * fill]
        ids, weights = ids[count:], weights[count:]
        if not ids:
            break
    return Laid(tuple(laid_ids), tuple(laid_weights), _spans(len(fragments), owners, places, len(laid_ids)), cut_off)


def _spans(count: int, owners: list[int], places: list[int], end: int) -> tuple[tuple[int, int] | None, ...]:
    """A fragment that was cut reaches to the last place, end mark included, as compel has it; but not the text that is one
    fragment alone and fills the window, which compel cuts before it looks."""
    spans: list[tuple[int, int] | None] = []
    for number in range(count):
        own = [i for i, owner in enumerate(owners) if owner == number]
        held = [places[i] for i in own if i < len(places)]
        beyond = len(own) > len(held) and not (own[0] == 0 and len(held) == end - 2)
        spans.append((held[0], end - 1 if beyond else held[-1]) if held else None)
    return tuple(spans)


def _cut_off(tokenizer: Tokenizer, fragments: Sequence[Fragment], room: int) -> str:
    left = room
    for number, fragment in enumerate(fragments):
        text, tokens = tokenizer.tokens(fragment.text)
        if len(tokens) > left:
            return " ".join([text[tokens[left].start :], *(later.text for later in fragments[number + 1 :])])
        left -= len(tokens)
    return ""


# -- Ways to divide: of more ids than there is room for, how many go into this window ------------------------------------


def _anywhere(ids: list[int], room: int, tokenizer: Tokenizer) -> int:
    return room


def _after_sentence(ids: list[int], room: int, tokenizer: Tokenizer) -> int:
    texts = {i: text for text, i in tokenizer.vocabulary.items()}
    words = [texts.get(i, "") for i in ids[:room]]
    for pattern in (r"\.</w>", r"[.,;:]</w>", r".*</w>"):
        if found := [i for i, word in enumerate(words) if re.fullmatch(pattern, word)]:
            return found[-1] + 1
    return room


def _after_comma(ids: list[int], room: int, tokenizer: Tokenizer) -> int:
    """A comma that is itself the first beyond goes into the next window, and nothing is moved for it; nor is it for a textual
    inversion that the end of the window would divide."""
    if beginning := _divided(ids, room, tokenizer):
        return beginning
    comma = tokenizer.vocabulary.get(",</w>")
    commas = [i for i in range(room) if ids[i] == comma]
    near = commas and ids[room] != comma and room - commas[-1] <= COMMA_REACH
    return commas[-1] + 1 if near else room


def _divided(ids: list[int], at: int, tokenizer: Tokenizer) -> int:
    """Where the placeholder begins that has tokens on both sides of `at`; 0 if there is none, or it begins the window."""
    for own in tokenizer.placeholders.values():
        for start in range(max(0, at - len(own) + 1), at):
            if tuple(ids[start : start + len(own)]) == own:
                return start
    return 0


DIVISIONS = {"cut": _anywhere, "windows": _anywhere, "sentences": _after_sentence, "commas": _after_comma}
LONG_PROMPTS = tuple(DIVISIONS)
