"""Composition accuracy: does a picture show what its prompt says, every colour with its shape, and in its place?

Prompts name two solids and how the one stands to the other; a judge that was trained on renders alone says what each picture
shows (`ldm/scenes/judge.py`). Prompts are of two splits: combinations of colour, shape and role that the bundled model was
trained on, and those that were held out (`ldm/scenes/world.py`).

Beside the accuracy stands the ceiling: the judge's accuracy on renders of the same scenes, and on the same renders encoded and
decoded, which no UNet on that autoencoder can be expected to pass.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch

from ldm import images
from ldm.checkpoint import Components
from ldm.pipelines import autoencoding
from ldm.pipelines.text_to_image import txt2img
from ldm.scenes import captions
from ldm.scenes.captions import Statement
from ldm.scenes.judge import Judge, verdicts
from ldm.scenes.render import render
from ldm.scenes.world import Noun, Scene, draw

SPLITS = {"seen": "train", "held_out": "held_out"}
PAIRS = ("side by side", "stacked", "in depth")
SEED = 903  # of the scenes that prompts are taken from; nothing was trained on it
PARTS = ("number", "colours", "shapes", "relation", "all")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One prompt, what it says, and a scene of which it is true."""

    scene: Scene
    statement: Statement
    prompt: str


@dataclass(frozen=True, kw_only=True)
class Score:
    """How many of `count` pictures have a part right; `all` needs them together."""

    count: int
    right: dict[str, int]

    def accuracy(self, part: str = "all") -> float:
        return self.right[part] / self.count

    def interval(self, part: str = "all") -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy (1927, Journal of the American Statistical Association 22, 209)."""
        n, p, z = self.count, self.accuracy(part), 1.959964
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return middle - half, middle + half


def cases(split: str, count: int) -> list[Case]:
    """The first `count` prompts of "seen" or "held_out"."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}; expected one of {', '.join(SPLITS)}")
    found = []
    for i in range(count):
        scene = draw(SEED, i, split=SPLITS[split], layouts=PAIRS)
        statement = captions.plain(scene, np.random.default_rng((SEED, i)))
        found.append(Case(scene=scene, statement=statement, prompt=captions.words(statement)))
    return found


def score(statements: list[Statement], said: list[tuple[str, tuple[Noun, ...]]]) -> Score:
    """What the judge said of pictures, held against what their prompts say."""
    right = Counter()
    for statement, (layout, nouns) in zip(statements, said, strict=True):
        wanted = statement.nouns
        right["number"] += len(nouns) == len(wanted)
        right["colours"] += sorted(noun[1] for noun in nouns) == sorted(noun[1] for noun in wanted)
        right["shapes"] += sorted(noun[2] for noun in nouns) == sorted(noun[2] for noun in wanted)
        right["relation"] += _relation_holds(statement, layout, nouns)
        right["all"] += captions.holds(statement, layout, nouns)
    return Score(count=len(said), right={part: right[part] for part in PARTS})


def _relation_holds(statement: Statement, layout: str, nouns: tuple[Noun, ...]) -> bool:
    """Whether the two solids that are most like those named stand as is said, whatever their colours and shapes are."""
    if len(nouns) != len(statement.nouns):
        return False
    facts = captions.facts(layout)
    orders = {(0, 1): 0, (1, 0): 0}
    for order in orders:
        likeness = zip(statement.nouns, (nouns[k] for k in order), strict=True)
        orders[order] = sum((a[1] == b[1]) + (a[2] == b[2]) for a, b in likeness)
    best = max(orders.values())
    return any(
        all((order[i], name, order[j]) in facts for i, name, j in statement.relations)
        for order, value in orders.items()
        if value == best
    )


@torch.no_grad()
def evaluate(
    components: Components,
    judge: Judge,
    split: str,
    count: int,
    *,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
    **settings: Any,
) -> Score:
    """Make a picture of each of the split's first `count` prompts, picture i from seed + i, and have them judged.

    settings: as of `ldm.txt2img`. progress: told how many pictures are done.
    """
    asked = cases(split, count)
    said = []
    width = settings.pop("batch_size", 50)
    for part in _portions(asked, width):
        prompts = [case.prompt for case in part]
        result = txt2img(components, prompts, seed=seed + len(said), batch_size=width, **settings)
        said += verdicts(judge, torch.cat([images.to_tensor(picture, picture.size) for picture in result.images]))
        progress(len(said))
    return score([case.statement for case in asked], said)


@torch.no_grad()
def ceiling(components: Components, judge: Judge, split: str, count: int) -> dict[str, Score]:
    """The same for renders of scenes that the prompts are true of, and for these renders encoded and decoded."""
    asked = cases(split, count)
    size = components.unet.config.sample_size * components.autoencoder.config.downsampling
    said: dict[str, list] = {"renders": [], "reconstructions": []}
    for part in _portions(asked, 50):
        pictures = render([case.scene for case in part], size).float() / 127.5 - 1
        said["renders"] += verdicts(judge, pictures)
        weight = components.autoencoder.quant_conv.weight
        latents = autoencoding.encode(components.autoencoder, pictures.to(weight), None).mode()
        remade = autoencoding.decode(components.autoencoder, latents * components.autoencoder.config.scaling_factor, None)
        said["reconstructions"] += verdicts(judge, remade.clamp(-1, 1).float().cpu())
    return {name: score([case.statement for case in asked], verdict) for name, verdict in said.items()}


def _portions(asked: list[Case], width: int) -> Iterator[list[Case]]:
    for start in range(0, len(asked), width):
        yield asked[start : start + width]
