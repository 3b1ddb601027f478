"""What a prompt says once its syntax has been read: fragments of text with weights, blended or put one after another.

`syntax_compel` and `syntax_a1111` make it from a prompt, `encoding` makes a context of it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

LORA = re.compile(r"<lora:(?P<name>[^:<>]+)(?::(?P<rest>[^<>]*))?>", re.IGNORECASE)


class PromptError(ValueError):
    """A prompt whose syntax is wrong: one line that names the position, counted from 1."""


@dataclass(frozen=True)
class Fragment:
    """Text that all has one weight. 1 leaves it as it is."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Swap:
    """Words to be drawn in the place, and with the attention, of others (Hertz et al. 2022, arXiv:2208.01626)."""

    original: tuple[Fragment, ...]
    edited: tuple[Fragment, ...]
    options: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Passage:
    """Fragments that are read as one text."""

    fragments: tuple[Fragment | Swap, ...]

    @property
    def original(self) -> tuple[Fragment, ...]:
        """The fragments, swaps not made."""
        return tuple(f for part in self.fragments for f in (part.original if isinstance(part, Swap) else (part,)))

    @property
    def edited(self) -> tuple[Fragment, ...]:
        """The fragments, swaps made."""
        return tuple(f for part in self.fragments for f in (part.edited if isinstance(part, Swap) else (part,)))


@dataclass(frozen=True)
class Blend:
    """The weighted sum of the contexts of several passages, of their weights' sum 1 where `normalise`."""

    passages: tuple[Passage, ...]
    weights: tuple[float, ...]
    normalise: bool = True


@dataclass(frozen=True)
class Prompt:
    """Parts whose contexts are put one after another, with a weight each, and the LoRAs that the prompt asks for.

    loras: (name, coefficient) each.
    """

    parts: tuple[Passage | Blend, ...]
    weights: tuple[float, ...]
    loras: tuple[tuple[str, float], ...] = ()

    @property
    def passages(self) -> tuple[Passage, ...]:
        """All of them, those of blends too."""
        return tuple(p for part in self.parts for p in (part.passages if isinstance(part, Blend) else (part,)))

    @property
    def swaps(self) -> bool:
        return any(isinstance(fragment, Swap) for passage in self.passages for fragment in passage.fragments)


def plain(text: str) -> Prompt:
    """A prompt without any syntax."""
    return Prompt((Passage((Fragment(text),)),), (1.0,))


def take_loras(text: str) -> tuple[str, tuple[tuple[str, float], ...]]:
    """The text with blanks in place of `<lora:name:coefficient>` tags, so that positions stay; and (name, coefficient) of
    each, 1 where none is given. Raises PromptError where one is no number."""
    loras: list[tuple[str, float]] = []
    for found in LORA.finditer(text):
        try:
            coefficient = 1.0 if found["rest"] is None else float(found["rest"])
        except ValueError:
            coefficient = float("nan")
        if not abs(coefficient) < float("inf"):
            what = f"{found.group()} has coefficient {found['rest']!r}; expected a number, as in <lora:name:0.8>"
            raise PromptError(f"position {found.start() + 1}: {what}")
        loras.append((found["name"].strip(), coefficient))
    return LORA.sub(lambda found: " " * len(found.group()), text), tuple(loras)


def joined(fragments: list[Fragment | Swap], glue: str = " ") -> tuple[Fragment | Swap, ...]:
    """Neighbours of the same weight become one."""
    made: list[Fragment | Swap] = []
    for fragment in fragments:
        last = made[-1] if made else None
        if isinstance(fragment, Fragment) and isinstance(last, Fragment) and last.weight == fragment.weight:
            made[-1] = Fragment(last.text + glue + fragment.text, last.weight)
        else:
            made.append(fragment)
    return tuple(made)
