"""Compel's prompt syntax: `word+`, `word--`, `(a phrase)1.3`, `("a", "b").blend(.7, .3)`, `.and()`, `.swap()`, `withLora()`.

    prompt      = [lora ...] (blend | text) [lora ...] | conjunction
    blend       = ( target, target ... ).blend( [weight, ...] [, no_normalize] )
    conjunction = ( target, target ... ).and( [weight, ...] )
    text        = (swap | lora | weighted | quoted | bracketed | anything up to the next white space) ...
    weighted    = target.attend(weight) | (quoted | bracketed) weight | word weight-of-signs
    weight      = + ... (1.1 each) | - ... (0.9 each) | number
    swap        = target.swap( words [, s_start=0.1 ...] )
    target      = quoted | bracketed | word

Within brackets and quotes weights multiply. `\\(`, `\\)` and `\\"` stand for themselves. As the compel package (2.x) reads
it, which its tests hold this to; but where that package takes what it cannot read for plain text, as it does with a bracket
that is not closed, the position is named here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ldm.text.prompt import Blend, Fragment, Passage, Prompt, PromptError, Swap, joined
from ldm.text.scanner import KEYWORD, NUMBER, SIGNS, Scanner, Source

MORE, LESS = 1.1, 0.9
DEEPEST = 50
SWAP_OPTIONS = ("s_start", "s_end", "t_start", "t_end", "shape_freedom")


def parse(text: str) -> Prompt:
    """Read a prompt. Raises PromptError, naming the position, where it is none."""
    source = Source.of(text)
    reader = _Reader(source)
    for name, make in ((".and", _conjunction), (".add", _conjunction), (".blend", _blend)):
        if made := reader.group(name, make):
            return made
    nodes = reader.text()
    return Prompt(*_parts([Passage(_flat(nodes))]), tuple(reader.loras))


# -- What is read: a tree whose weights multiply downwards ---------------------------------------------------------------


@dataclass(frozen=True)
class _Weighted:
    weight: float
    children: list[Any]


def _flat(nodes: list[Any], scale: float = 1.0) -> tuple[Fragment | Swap, ...]:
    """The leaves, each with the product of the weights above it."""

    def leaves(nodes: list[Any], scale: float) -> list[Fragment | Swap]:
        found: list[Fragment | Swap] = []
        for node in nodes:
            if isinstance(node, _Weighted):
                found += leaves(node.children, scale * node.weight)
            elif isinstance(node, Swap):
                found.append(Swap(joined(leaves(node.original, scale)), joined(leaves(node.edited, scale)), node.options))
            else:
                found.append(Fragment(node.text, node.weight * scale))
        return found

    return joined(leaves(nodes, scale))


def _parts(parts: list[Passage | Blend], weights: list[float] | None = None) -> tuple[tuple, tuple]:
    """The parts that say something, with their weights; the empty text if none does."""
    weights = [1.0] * len(parts) if weights is None else weights
    kept = [(part, w) for part, w in zip(parts, weights, strict=True) if isinstance(part, Blend) or part.fragments]
    kept = kept or [(Passage((Fragment(""),)), 1.0)]
    return tuple(zip(*kept, strict=True))


def _conjunction(reader: "_Reader", passages: list[Passage], options: list[tuple[str, Any]], at: int) -> Prompt:
    weights = [reader.source.number(value, at) for value in _values(options, reader.source, at)]
    if weights and len(weights) != len(passages):
        raise reader.source.error(at, f".and has {len(weights)} weights for {len(passages)} prompts; give each one, or none")
    return Prompt(*_parts(passages, weights or None), tuple(reader.loras))


def _blend(reader: "_Reader", passages: list[Passage], options: list[tuple[str, Any]], at: int) -> Prompt:
    values = _values(options, reader.source, at)
    normalise = values[-1:] != ["no_normalize"]
    weights = [reader.source.number(value, at) for value in (values if normalise else values[:-1])] or [1.0] * len(passages)
    if len(weights) != len(passages):
        raise reader.source.error(at, f".blend has {len(weights)} weights for {len(passages)} prompts; give each one, or none")
    if normalise and sum(weights) == 0:
        raise reader.source.error(at, "the weights of .blend add up to 0; change one, or add no_normalize")
    if any(isinstance(fragment, Swap) for passage in passages for fragment in passage.fragments):
        raise reader.source.error(at, ".swap cannot stand in a .blend")
    filled = tuple(passage if passage.fragments else Passage((Fragment(""),)) for passage in passages)
    return Prompt((Blend(filled, tuple(weights), normalise),), (1.0,), tuple(reader.loras))


def _values(options: list[tuple[str, Any]], source: "Source", at: int) -> list[Any]:
    named = [name for name, _ in options if name]
    if named:
        raise source.error(at, f"{named[0]}= is no option here; expected weights")
    return [value for _, value in options]


class _Reader(Scanner):
    """Reads from `at` onwards. Methods return None, and leave `at` where it was, where what they look for is not there."""

    def __init__(self, source: Source, loras: list[tuple[str, float]] | None = None, depth: int = 0):
        super().__init__(source)
        self.loras: list[tuple[str, float]] = [] if loras is None else loras
        self.depth = depth
        self.known: dict[tuple[int, bool], tuple[list[Any], int]] = {}  # brackets and quotes, read once: where, and to where

    # Whole prompts

    def group(self, name: str, make: Callable[..., Prompt]) -> Prompt | None:
        """( target, target ... ).name( options ), and nothing after it but LoRAs."""
        while self.lora():
            pass
        start, asked = self.at, len(self.loras)
        targets = self._targets()
        if targets is None or not self.take(name, then="("):
            self.at = start
            del self.loras[asked:]
            self.known.clear()
            return None
        named = self.at - len(name) - 1
        options = self.options()
        if options is None or not self.take(")"):
            raise self.source.error(self.at, f"{name} is not closed; expected weights and )")
        while self.lora():
            pass
        self.blank()
        if self.at < len(self.source.text):
            raise self.source.error(self.at, f"there is text after {name}(...); put it into one of the prompts in brackets")
        return make(self, [Passage(_flat(nodes)) for nodes in targets], options, named)

    def _targets(self) -> list[list[Any]] | None:
        """( target, ... ): bracketed, quoted, or one word each."""
        if not self.take("("):
            return None
        found = []
        while (nodes := self._target(prompts=True)) is not None:
            found.append(nodes)
            if not self.take(","):
                break
        return found if found and self.take(")") else None

    def text(self) -> list[Any]:
        """Everything up to the end."""
        found: list[Any] = []
        while self.blank() < len(self.source.text):
            if self.lora():
                continue
            nodes = self._swap() or self._weighted() or self._quoted() or self._bracketed()
            found += [self.free_word()] if nodes is None else nodes
        return found

    # Parts of them

    def lora(self) -> bool:
        start = self.at
        for name in ("useLora", "withLora"):
            if self.take(name, then="("):
                keyword = self.match(KEYWORD)
                coefficient = self.match(NUMBER) if keyword and self.take(",") else "1"
                if not keyword or coefficient is None or not self.take(")"):
                    raise self.source.error(start, f"{name} cannot be read; expected {name}(name, coefficient)")
                self.loras.append((keyword, float(coefficient)))
                return True
        return False

    def _weighted(self) -> list[Any] | None:
        start = self.at
        nodes = self._target()
        if nodes is not None and self.take(".attend", then="("):
            weight = self.match(SIGNS) or self.match(NUMBER)
            if not weight or not self.take(")"):
                raise self.source.error(self.at, ".attend cannot be read; expected .attend(+), .attend(--) or .attend(1.2)")
            return [_Weighted(_weight(weight), nodes)]
        self.at = start
        nodes = self._quoted()
        nodes = self._bracketed() if nodes is None else nodes
        is_word = nodes is None
        if is_word and (word := self.word()) is not None:
            nodes = [word]
        weight = None
        if nodes is not None and self.at < len(self.source.text) and not self.source.text[self.at].isspace():
            weight = self.match(SIGNS) or (None if is_word else self.match(NUMBER))
        if weight is None:
            self.at = start
            return None
        return [_Weighted(_weight(weight), nodes)]

    def _swap(self) -> list[Any] | None:
        start = self.at
        nodes = self._target()
        if nodes is None or not self.take(".swap", then="("):
            self.at = start
            return None
        edited, options = self._sequence(commas=False), []
        if self.take(","):
            options = self.options() or []
        if not self.take(")"):
            raise self.source.error(start, ".swap cannot be read; expected .swap(words) or .swap(words, s_start=0.1)")
        for name, value in options:
            if name not in SWAP_OPTIONS or not isinstance(value, float):
                raise self.source.error(
                    start, f".swap has option {name or value}; expected numbers for {', '.join(SWAP_OPTIONS)}"
                )
        return [Swap(nodes or [Fragment("")], edited or [Fragment("")], dict(options))]

    def _target(self, *, prompts: bool = False) -> list[Any] | None:
        """What an operator can follow. prompts: whether quotes may hold a whole text."""
        nodes = self._quoted(prompts=prompts)
        nodes = self._bracketed() if nodes is None else nodes
        if nodes is None and (word := self.word()) is not None:
            return [word]
        return nodes

    def _bracketed(self) -> list[Any] | None:
        start = self.blank()
        if self.source.text[start : start + 1] != "(":
            return None
        return self._once(start, False, self._read_bracketed)

    def _read_bracketed(self) -> list[Any]:
        start, self.at, self.depth = self.at, self.at + 1, self.depth + 1
        if self.depth > DEEPEST:
            raise self.source.error(start, f"brackets stand more than {DEEPEST} deep in one another")
        nodes = self._sequence(commas=True)
        self.depth -= 1
        if not self.take(")"):
            if self.blank() >= len(self.source.text):
                raise self.source.error(start, "the bracket is not closed; close it, or write \\( for a bracket that is text")
            letter = self.source.text[self.at]
            raise self.source.error(self.at, f"{letter!r} cannot stand alone in brackets; write it in a word, or leave it out")
        return nodes

    def _quoted(self, *, prompts: bool = False) -> list[Any] | None:
        start = self.blank()
        if self.source.text[start : start + 1] != '"':
            return None
        return self._once(start, prompts, lambda: self._read_quoted(prompts))

    def _read_quoted(self, prompts: bool) -> list[Any]:
        start, end = self.at, self.at + 1
        while end < len(self.source.text) and self.source.text[end] != '"':
            end += 2 if self.source.text.startswith('\\"', end) else 1
        if end >= len(self.source.text):
            raise self.source.error(start, 'the quotation is not closed; close it, or write \\" for a quote that is text')
        inside = self.source.part(start + 1, end)
        self.at = end + 1
        asked = len(self.loras)
        try:
            nodes = _Reader(inside, self.loras, self.depth).whole_sequence()
        except PromptError:
            if not prompts:
                raise
            del self.loras[asked:]
            nodes = _Reader(inside, self.loras, self.depth).text()
        return nodes or [Fragment("")]

    def _once(self, start: int, prompts: bool, read: Callable[[], list[Any]]) -> list[Any]:
        """What stands at `start`, read the first time that it is asked for: no bracket is read again for each operator that
        could follow it, nor are its LoRAs counted twice."""
        if (start, prompts) not in self.known:
            self.known[start, prompts] = read(), self.at
        nodes, self.at = self.known[start, prompts]
        return nodes

    def whole_sequence(self) -> list[Any]:
        """A sequence up to the end."""
        nodes = self._sequence(commas=True)
        if self.blank() < len(self.source.text):
            letter = self.source.text[self.at]
            raise self.source.error(self.at, f"{letter!r} cannot stand alone in quotes; write it in a word, or leave it out")
        return nodes

    def _sequence(self, *, commas: bool) -> list[Any]:
        """What may stand in brackets: as in `text`, but words of letters alone."""
        found: list[Any] = []
        while True:
            if self.lora():
                continue
            nodes = self._weighted() or self._swap()
            nodes = self._bracketed() if nodes is None else nodes
            nodes = self._quoted() if nodes is None else nodes
            if nodes is None and (word := self.word()) is not None:
                nodes = [word]
            if nodes is None and commas and self.source.text[self.blank() : self.at + 1] in (",", "."):
                nodes = [Fragment(self.source.text[self.at])]
                self.at += 1
            if nodes is None:
                return found
            found += nodes


def _weight(text: str) -> float:
    return {"+": MORE, "-": LESS}[text[0]] ** len(text) if text.strip("+-") == "" else float(text)
