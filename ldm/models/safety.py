"""The network of the safety checker: how near an image lies to each of a list of unwanted concepts.

Rando et al. 2022, "Red-Teaming the Stable Diffusion Safety Filter", arXiv:2210.04610, describe it from the released weights:
CLIP's image tower, and for every concept an embedding and a threshold on its cosine similarity. Here the cosines are
computed; what follows from a threshold passed is for the caller to decide.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.clip import ImageConfig, ImageEncoder


@dataclass(frozen=True, kw_only=True)
class SafetyConfig(ImageConfig):
    """The image tower's fields, and the number of concepts of each kind."""

    concepts: int = 17
    special_care_concepts: int = 3


class SafetyChecker(nn.Module):
    """Pixels (b, 3, image_size, image_size), normalised as CLIP's -> cosines (b, concepts), (b, special_care_concepts)."""

    def __init__(self, config: SafetyConfig):
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(config)
        self.register_buffer("concepts", torch.zeros(config.concepts, config.projection_width))
        self.register_buffer("concept_thresholds", torch.zeros(config.concepts))
        self.register_buffer("special_care", torch.zeros(config.special_care_concepts, config.projection_width))
        self.register_buffer("special_care_thresholds", torch.zeros(config.special_care_concepts))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        embedding = F.normalize(self.image_encoder(pixels), dim=-1)
        return embedding @ F.normalize(self.concepts, dim=-1).T, embedding @ F.normalize(self.special_care, dim=-1).T
