"""The safety checker's verdict on a picture, and what is done about it.

The network (`ldm/models/safety.py`) says how near a picture lies to each of 17 unwanted concepts and 3 of special care.
Each cosine's margin over its threshold is rounded to 3 decimals; a concept is hit where that is above 0. Once a concept of
special care is hit, all later margins are 0.01 larger; special care alone flags nothing. diffusers does this in float32, and so
does this file, to the last digit; Rando et al. 2022, arXiv:2210.04610, describe it from the released weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from ldm.models.clip import normalised
from ldm.models.safety import SafetyChecker

ACTIONS = ("black", "blur", "flag", "off")
AT_ONCE = 8  # pictures in one pass of the network
STRICTER = 0.01  # what a hit of special care adds to later margins
BLUR = 1 / 8  # of the shorter side: of a face that fills the picture, a stain is left


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the checker says of one picture. Concepts are known by their number; the released file has no names for them.

    flagged: whether any of the concepts is hit (special care alone flags nothing). margins, special_care_margins: cosine less
    threshold, with what special care adds, rounded to 3 decimals; above 0 is a hit. concepts, special_care: those that are.
    cosines, special_care_cosines: unrounded.
    """

    flagged: bool
    concepts: tuple[int, ...]
    special_care: tuple[int, ...]
    margins: tuple[float, ...]
    special_care_margins: tuple[float, ...]
    cosines: tuple[float, ...]
    special_care_cosines: tuple[float, ...]


@torch.no_grad()
def check(checker: SafetyChecker, pictures: Sequence[Image.Image]) -> list[Verdict]:
    """A verdict on each picture, whatever else is looked at beside it."""
    verdicts: list[Verdict] = []
    weight = checker.image_encoder.patch_embedding.weight
    for start in range(0, len(pictures), AT_ONCE):
        size = checker.config.image_size
        pixels = torch.stack([prepared(picture, size) for picture in pictures[start : start + AT_ONCE]])
        cosines, special = (found.float().cpu().numpy() for found in checker(pixels.to(weight)))
        verdicts += [_verdict(checker, *rows) for rows in zip(cosines, special, strict=True)]
    return verdicts


def prepared(picture: Image.Image, size: int) -> Tensor:
    """A picture as the network takes it, (3, size, size): its shorter side made `size` by bicubic resampling, the middle cut
    out, and CLIP's mean and deviation applied."""
    picture = picture.convert("RGB")
    shorter = min(picture.size)
    width, height = (size if side == shorter else size * side // shorter for side in picture.size)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    middle = np.asarray(resized.crop((left, top, left + size, top + size)), dtype=np.float32)
    return normalised(torch.from_numpy(middle / 255).permute(2, 0, 1))


def act(picture: Image.Image, verdict: Verdict | None, action: str) -> Image.Image:
    """The picture, or what stands in for it where it is flagged: "black", or "blur" beyond recognition. "flag" and "off" change
    nothing."""
    if verdict is None or not verdict.flagged or action not in ("black", "blur"):
        return picture
    if action == "black":
        return Image.new("RGB", picture.size)
    return picture.convert("RGB").filter(ImageFilter.GaussianBlur(max(min(picture.size) * BLUR, 4)))


def _verdict(checker: SafetyChecker, cosines: np.ndarray, special: np.ndarray) -> Verdict:
    added, margins, hits = 0.0, {}, {}
    for kind, found, thresholds in (
        ("special_care", special, checker.special_care_thresholds),
        ("concepts", cosines, checker.concept_thresholds),
    ):
        rounded = []
        for cosine, threshold in zip(found, thresholds.tolist(), strict=True):
            rounded.append(round(cosine - threshold + added, 3))  # float32 throughout, since a NumPy scalar leads
            if kind == "special_care" and rounded[-1] > 0:
                added = STRICTER
        margins[kind] = tuple(round(float(margin), 3) for margin in rounded)
        hits[kind] = tuple(i for i, margin in enumerate(rounded) if margin > 0)
    return Verdict(
        flagged=bool(hits["concepts"]),
        concepts=hits["concepts"],
        special_care=hits["special_care"],
        margins=margins["concepts"],
        special_care_margins=margins["special_care"],
        cosines=tuple(cosines.tolist()),
        special_care_cosines=tuple(special.tolist()),
    )
