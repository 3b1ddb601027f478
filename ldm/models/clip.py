"""CLIP's two towers: the text transformer that conditions the UNet, and the image tower of safety checker and CLIP score.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv:2103.00020, section 2.4.
Text: token ids (b, n) -> hidden states (b, n, width). Image: pixels (b, 3, size, size) -> embedding (b, projection_width).
Both are the same pre-norm transformer; the text one attends backwards only, and ignores which tokens are padding.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.models.attention import Attention

NORM_EPS = 1e-5
# Mean and deviation of the channels of the pictures that CLIP was trained on, in [0, 1].
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text transformer of CLIP ViT-L/14."""

    vocabulary_size: int = 49408
    context_length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """The image tower of CLIP ViT-L/14."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    projection_width: int = 768


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), a cheaper GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2); CLIP uses it."""
    return x * torch.sigmoid(1.702 * x)


class MLP(nn.Module):
    """Two layers applied to each token alone: (b, n, width) -> (b, n, width)."""

    def __init__(self, width: int, hidden_width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(x)))


class TransformerLayer(nn.Module):
    """Pre-norm transformer layer: (b, n, width) -> (b, n, width)."""

    def __init__(self, width: int, heads: int, mlp_width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, mlp_width)

    def forward(self, x: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), causal=causal, mask=mask)
        return x + self.mlp(self.norm2(x))


class TextEncoder(nn.Module):
    """Token ids (b, n), n at most `context_length` -> hidden states (b, n, width) after the final norm.

    These hidden states, one for each token, are the UNet's `context`.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)
        self.layers = nn.ModuleList(
            TransformerLayer(config.width, config.heads, config.mlp_width) for _ in range(config.layers)
        )
        self.final_norm = nn.LayerNorm(config.width, eps=NORM_EPS)

    def forward(self, ids: Tensor, mask: Tensor | None = None, *, clip_skip: int = 1) -> Tensor:
        """mask: which tokens may be attended to, (b, n) of bool; all where it is left out. clip_skip: at which layer to stop,
        counted from the end: 1 is the last, 2 the one before it. The final norm follows in any case."""
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        visible = None if mask is None else mask[:, None, None] & mask.new_ones(2 * ids.shape[1:]).tril()
        for layer in self.layers[: len(self.layers) + 1 - clip_skip]:
            x = layer(x, causal=visible is None, mask=visible)
        return self.final_norm(x)


def pool(hidden: Tensor, ids: Tensor, end_token: int) -> Tensor:
    """The hidden state at each text's *first* end token, the only one that has seen all of it: (b, n, d), (b, n) -> (b, d).

    Every row of `ids` must hold an end token. OpenAI takes the highest id instead: the same as long as the end token is
    the last of the vocabulary, wrong once words have been added to it.
    """
    first_end = (ids == end_token).int().argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), first_end]


def normalised(pixels: Tensor) -> Tensor:
    """Pixels (b, 3, h, w) in [0, 1] -> as the image tower takes them."""
    mean, deviation = (torch.tensor(v, dtype=pixels.dtype, device=pixels.device)[:, None, None] for v in (MEAN, DEVIATION))
    return (pixels - mean) / deviation


class ImageEncoder(nn.Module):
    """Pixels (b, 3, image_size, image_size), normalised by CLIP's mean and std -> embedding (b, projection_width)."""

    def __init__(self, config: ImageConfig):
        super().__init__()
        self.config = config
        patches = (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(patches + 1, config.width)
        self.pre_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.layers = nn.ModuleList(
            TransformerLayer(config.width, config.heads, config.mlp_width) for _ in range(config.layers)
        )
        self.post_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.projection = nn.Linear(config.width, config.projection_width, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = rearrange(self.patch_embedding(pixels), "b d h w -> b (h w) d")
        class_token = self.class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat([class_token, patches], dim=1) + self.position_embedding.weight
        x = self.pre_norm(x)
        for layer in self.layers:
            x = layer(x)
        return self.projection(self.post_norm(x[:, 0]))  # only the class token is read
