"""The CLIP score: how well pictures fit their prompts, as the mean cosine of their embeddings.

Radford et al. 2021 (arXiv:2103.00020) for the embeddings, Hessel et al. 2021, "CLIPScore", arXiv:2104.08718, for the score.
There it is 2.5 max(cos, 0) of each pair; in the tables of Stable Diffusion it is the mean cosine itself, about 0.26, and
torchmetrics gives 100 times that, no less than 0. Embeddings (n, d) and (n, d) -> one number, which compares only with those of
the same CLIP.
"""

from dataclasses import dataclass
from math import sqrt

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ClipScore:
    """mean: of the cosines, -1 to 1. deviation: theirs, of one pair from another (0 for a single one). count: of pairs."""

    mean: float
    deviation: float
    count: int

    @property
    def hundredfold(self) -> float:
        """As torchmetrics gives it: 100 times the mean, and 0 where that is negative."""
        return max(100 * self.mean, 0.0)

    @property
    def error(self) -> float:
        """Of the mean, by chance of which pairs were looked at: the standard error."""
        return self.deviation / sqrt(self.count)


def cosines(pictures: Tensor, texts: Tensor) -> Tensor:
    """The cosine of each picture and its own prompt: embeddings (n, d) and (n, d) -> (n,), float64."""
    if pictures.shape != texts.shape or pictures.ndim != 2 or not len(pictures):
        shapes = f"{list(pictures.shape)} and {list(texts.shape)}"
        raise ValueError(f"embeddings of pictures and prompts have shapes {shapes}; expected the same (n, d), n at least 1")
    return (F.normalize(pictures.double(), dim=1) * F.normalize(texts.double(), dim=1)).sum(dim=1)


def clip_score(pictures: Tensor, texts: Tensor) -> ClipScore:
    """Of pictures and their own prompts, by their embeddings (n, d) and (n, d), normalised or not. Raises ValueError where a
    cosine is NaN."""
    each = cosines(pictures, texts)
    if not each.isfinite().all():
        raise ValueError(f"the cosine of pair {int((~each.isfinite()).nonzero()[0])} is NaN; are the embeddings sound?")
    deviation = float(each.std()) if len(each) > 1 else 0.0
    return ClipScore(mean=float(each.mean()), deviation=deviation, count=len(each))
