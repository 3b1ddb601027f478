"""From prompts to the contexts that a UNet attends to: syntax read, text laid into windows, encoded, and weighted.

    text -> `parse` -> Prompt -> windows of tokens -> text encoder, all rows of all prompts at once -> weights -> (b, 77 k, d)

Two ways of weighting, by whose syntax is used. Compel's: a weight moves the states away from those of the empty text, z =
z_empty + w (z - z_empty), and for each fragment below 1 the states without it (its tokens masked) are blended in with
tan((1 - w) pi / 2). A1111's: each state is multiplied by its token's weight, and all are rescaled to their former mean.
All contexts are filled up with windows of the empty text to the longest, so that they go through the UNet together.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.text import syntax_a1111, syntax_compel
from ldm.text.prompt import Blend, Fragment, Passage, Prompt, plain, take_loras
from ldm.text.tokenizer import Tokenizer
from ldm.text.windows import Laid, lay

SYNTAXES = {"plain": plain, "compel": syntax_compel.parse, "a1111": syntax_a1111.parse}
LEAST = 1e-5  # what a weight of 0 counts as below 1, whose tangent would be infinite


@dataclass(frozen=True)
class Contexts:
    """The contexts (b, 77 k, d) of b prompts, and of each the text that did not fit ("" where all did)."""

    states: Tensor
    cut_off: tuple[str, ...]


def parse(text: str, syntax: str) -> Prompt:
    """Read a prompt in one of `SYNTAXES`, and the `<lora:name:0.8>` tags in it. Raises PromptError, naming the position."""
    rest, loras = take_loras(text)
    prompt = SYNTAXES[syntax](rest)
    return dataclasses.replace(prompt, loras=loras + prompt.loras)


def encode(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    text_encoder: Any,
    *,
    syntax: str = "plain",
    long_prompt: str = "cut",
    clip_skip: int = 1,
) -> Contexts:
    """Encode prompts that `parse` has read. Of swaps, the original words count.

    syntax: whose weighting. long_prompt: one of `windows.LONG_PROMPTS`. clip_skip: counted as A1111 does, 1 for the last layer.
    """
    rows = _Rows(tokenizer, long_prompt)
    plans = [[_plan(part, rows, syntax) for part in prompt.parts] for prompt in prompts]
    if _needs_empty(prompts, plans, syntax):
        rows.add(rows.empty)
    rows.encode(text_encoder, clip_skip)
    made = [_prompt(prompt, plan, rows, syntax) for prompt, plan in zip(prompts, plans, strict=True)]
    longest = max(len(states) for states in made)
    states = torch.stack([rows.filled(states, longest) for states in made])
    return Contexts(states, tuple(" ".join(cut for part in plan for cut in part.cut_off if cut) for plan in plans))


def cut_off(prompt: Prompt, tokenizer: Tokenizer, long_prompt: str) -> str:
    """The text of a prompt that does not fit, without encoding any."""
    return " ".join(cut for p in prompt.passages if (cut := lay(tokenizer, p.original, long_prompt).cut_off))


class _Rows:
    """The rows that go through the encoder, each once: window after window, with which of their tokens may be attended to."""

    def __init__(self, tokenizer: Tokenizer, long_prompt: str):
        self.tokenizer, self.long_prompt = tokenizer, long_prompt
        self.rows: dict[tuple[tuple[int, ...], tuple[bool, ...] | None], int] = {}
        self.empty = lay(tokenizer, (), long_prompt)

    def lay(self, fragments: Sequence[Fragment]) -> Laid:
        return lay(self.tokenizer, fragments, self.long_prompt)

    def add(self, laid: Laid, without: tuple[int, int] | None = None) -> tuple[int, ...]:
        """The rows of these windows, the tokens of a span masked (but never the first and the last place of a window, where
        there are several)."""
        length, found = self.tokenizer.length, []
        for start in range(0, len(laid.ids), length):
            mask = None
            if without is not None:
                seen = [not without[0] <= start + i <= without[1] for i in range(length)]
                if len(laid.ids) > length or self.long_prompt != "cut":
                    seen[0] = seen[-1] = True
                mask = None if all(seen) else tuple(seen)
            found.append(self.rows.setdefault((laid.ids[start : start + length], mask), len(self.rows)))
        return tuple(found)

    def encode(self, text_encoder: Any, clip_skip: int) -> None:
        """Rows without masks go by themselves, as they do where nothing is weighted."""
        device = text_encoder.token_embedding.weight.device
        states: dict[int, Tensor] = {}
        for masked in (False, True):
            chosen = [(key, at) for key, at in self.rows.items() if (key[1] is not None) == masked]
            if not chosen:
                continue
            ids = torch.tensor([ids for (ids, _), _ in chosen], device=device)
            mask = torch.tensor([mask for (_, mask), _ in chosen], device=device) if masked else None
            made = text_encoder(ids, mask, clip_skip=clip_skip)
            states |= {at: row for (_, at), row in zip(chosen, made, strict=True)}
        self.states = states

    def read(self, rows: tuple[int, ...]) -> Tensor:
        """(77 k, d), one window after another."""
        return torch.cat([self.states[row] for row in rows])

    def filled(self, states: Tensor, length: int) -> Tensor:
        """With windows of the empty text at the end."""
        missing = (length - len(states)) // self.tokenizer.length
        return torch.cat([states, *[self.read(self.add(self.empty))] * missing]) if missing else states


@dataclass(frozen=True)
class _Text:
    """What is needed of a passage: its windows, whole, and without each of the fragments that weigh less than 1."""

    weights: tuple[float, ...]
    whole: tuple[int, ...]
    without: tuple[tuple[float, tuple[int, ...]], ...]
    cut_off: tuple[str, ...]

    @property
    def texts(self) -> tuple["_Text"]:
        return (self,)


@dataclass(frozen=True)
class _Texts:
    texts: tuple[_Text, ...]

    @property
    def cut_off(self) -> tuple[str, ...]:
        return tuple(cut for text in self.texts for cut in text.cut_off)


def _plan(part: Passage | Blend, rows: _Rows, syntax: str) -> _Text | _Texts:
    """Note down all rows that a part of a prompt needs."""
    if isinstance(part, Blend):
        return _Texts(tuple(_plan(passage, rows, syntax) for passage in part.passages))
    fragments = part.original
    laid = rows.lay(fragments)
    lighter = [(f.weight, span) for f, span in zip(fragments, laid.spans, strict=True) if f.weight < 1 and span]
    without = tuple((weight, rows.add(laid, span)) for weight, span in lighter) if syntax == "compel" else ()
    return _Text(laid.weights, rows.add(laid), without, (laid.cut_off,))


def _needs_empty(prompts: Sequence[Prompt], plans: list[list[_Text | _Texts]], syntax: str) -> bool:
    """Whether anything is weighted against the empty text, or filled up with it."""
    texts = [[text for part in plan for text in part.texts] for plan in plans]
    weighted = syntax == "compel" and any(weight != 1 for plan in texts for text in plan for weight in text.weights)
    counts = {sum(len(part.texts[0].whole) for part in plan) for plan in plans}
    uneven = len(counts) > 1 or any(len({len(text.whole) for text in part.texts}) > 1 for plan in plans for part in plan)
    return weighted or uneven or any(weight != 1 for prompt in prompts for weight in prompt.weights)


def _prompt(prompt: Prompt, plan: list[_Text | _Texts], rows: _Rows, syntax: str) -> Tensor:
    """The states of a whole prompt, (77 k, d): its parts one after another."""
    made = []
    for part, planned, weight in zip(prompt.parts, plan, prompt.weights, strict=True):
        states = _blended(part, planned, rows) if isinstance(part, Blend) else _weighted(planned, rows, syntax)
        if weight != 1:
            states = _moved(states, rows, torch.full((len(states),), weight, dtype=torch.float64))
        made.append(states)
    return torch.cat(made)


def _blended(blend: Blend, plan: _Texts, rows: _Rows) -> Tensor:
    made = [_weighted(text, rows, "compel") for text in plan.texts]
    longest = max(len(states) for states in made)
    return _sum([rows.filled(states, longest) for states in made], blend.weights, normalise=blend.normalise)


def _weighted(text: _Text, rows: _Rows, syntax: str) -> Tensor:
    weights = torch.tensor(text.weights, dtype=torch.float64)
    whole = rows.read(text.whole)
    if (weights == 1).all():
        return whole
    if syntax == "a1111":
        windows, by_window = (part.split(rows.tokenizer.length) for part in (whole, weights))
        return torch.cat([_scaled(window, own) for window, own in zip(windows, by_window, strict=True)])
    states, shares = [_moved(whole, rows, weights)], [1.0]
    for weight, without in text.without:
        states.append(_moved(rows.read(without), rows, weights))
        shares.append(math.tan((1 - max(weight, LEAST)) * math.pi / 2))
    return _sum(states, shares, normalise=True)


def _scaled(states: Tensor, weights: Tensor) -> Tensor:
    """A window's states times their weights, brought back to the mean they had."""
    wide = states.float() if states.dtype != torch.float64 else states
    scaled = wide * weights.to(wide)[:, None]
    return (scaled * (wide.mean() / scaled.mean())).to(states)


def _moved(states: Tensor, rows: _Rows, weights: Tensor) -> Tensor:
    """Away from the empty text's states, or towards them. Weights of 1 leave the bits as they are."""
    empty = rows.filled(states[:0], len(states))
    weights = weights.to(states)[:, None]
    return torch.where(weights == 1, states, empty + (states - empty) * weights)


def _sum(states: list[Tensor], weights: Sequence[float], *, normalise: bool) -> Tensor:
    if len(states) == 1 and (normalise or weights[0] == 1):
        return states[0]
    shares = torch.tensor(weights, dtype=torch.float64)
    shares = (shares / shares.sum() if normalise else shares).to(states[0])
    return (torch.stack(states) * shares[:, None, None]).sum(dim=0)
