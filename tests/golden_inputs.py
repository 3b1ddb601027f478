"""The inputs of the golden references, for the script that makes them and the test that reads them."""

import torch
from torch import Tensor

from ldm.models.safety import SafetyConfig
from tests import seeded

SAFETY = SafetyConfig(image_size=28, patch_size=14, width=32, layers=2, heads=4, mlp_width=64, projection_width=24)
TIMESTEPS = (981, 0, 1, 500, 999)


def ids() -> Tensor:
    """Three rows of 77 token ids: a short text, an empty one, one that fills all places. Marks as in Stable Diffusion."""
    rows = torch.full((3, 77), 49407)
    rows[:, 0] = 49406
    rows[0, 1:7] = torch.tensor([320, 736, 14296, 525, 1253, 539])
    rows[2, 1:76] = torch.arange(75) * 613 % 49406
    return rows


def x() -> Tensor:
    """Noisy latents, of a size that the down path halves to odd numbers."""
    return seeded.tensor("x", 2, 4, 10, 12).double()


def images() -> Tensor:
    return seeded.tensor("images", 2, 3, 32, 40).double()


def latents() -> Tensor:
    return seeded.tensor("latents", 2, 4, 4, 5).double()


def pixels() -> Tensor:
    return seeded.tensor("pixels", 2, 3, SAFETY.image_size, SAFETY.image_size).double()
