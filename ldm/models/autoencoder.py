"""The KL autoencoder: images (b, 3, h, w) in [-1, 1] <-> latents (b, 4, h/8, w/8).

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752, section 3.1 and
appendix G; Kingma & Welling 2013, "Auto-Encoding Variational Bayes", arXiv:1312.6114. Convolutions with one attention
block at the coarsest level, in encoder and decoder alike.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.attention import Attention

NORM_EPS = 1e-6
LOG_VARIANCE_RANGE = (-30.0, 20.0)  # keeps exp() finite; the bounds of CompVis's DiagonalGaussianDistribution


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The f = 8 autoencoder of SD v1. Latents are multiplied by `scaling_factor` to give the UNet unit variance."""

    image_channels: int = 3
    latent_channels: int = 4
    level_widths: tuple[int, ...] = (128, 256, 512, 512)
    residual_blocks: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.18215

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a latent: the f of "f = 8"."""
        return 2 ** (len(self.level_widths) - 1)


@dataclass(frozen=True)
class Posterior:
    """q(z | x), a Gaussian independent in every element (arXiv:1312.6114, eq. 9). Fields (b, c, h, w)."""

    mean: Tensor
    log_variance: Tensor

    def mode(self) -> Tensor:
        """The most likely latents."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """Latents drawn with `noise` ~ N(0, 1) of the mean's shape (eq. 10)."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) summed over each image's latents, in nats: (b,) (arXiv:1312.6114, appendix B)."""
        terms = self.mean**2 + self.log_variance.exp() - 1.0 - self.log_variance
        return 0.5 * terms.sum(dim=(1, 2, 3))


class ResidualBlock(nn.Module):
    """(b, in, h, w) -> (b, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class AttentionBlock(Attention):
    """One-headed self-attention over all pixels: (b, c, h, w) -> (b, c, h, w)."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, heads=1)
        self.norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        attended = super().forward(tokens)
        return x + rearrange(attended, "b (h w) c -> b c h w", h=x.shape[2])


class Middle(nn.Module):
    """The coarsest level: residual, attention, residual."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.residual_1 = ResidualBlock(channels, channels, groups)
        self.attention = AttentionBlock(channels, groups)
        self.residual_2 = ResidualBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual_2(self.attention(self.residual_1(x)))


class DownLevel(nn.Module):
    """Residual blocks, then, on every level but the last, half the resolution."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int, *, downsample: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.residual = nn.ModuleList(ResidualBlock(i, o, groups) for i, o in pairwise(widths))
        self.downsample = nn.Conv2d(out_channels, out_channels, 3, stride=2) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.residual:
            x = block(x)
        if self.downsample is None:
            return x
        return self.downsample(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as CompVis trained it


class UpLevel(nn.Module):
    """One residual block more than going down, then, on every level but the last, twice the resolution."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int, *, upsample: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.residual = nn.ModuleList(ResidualBlock(i, o, groups) for i, o in pairwise(widths))
        self.upsample = nn.Conv2d(out_channels, out_channels, 3, padding=1) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.residual:
            x = block(x)
        if self.upsample is None:
            return x
        return self.upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Encoder(nn.Module):
    """Images (b, image_channels, h, w) -> features (b, 2 latent_channels, h/f, w/f)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, groups, last = config.level_widths, config.norm_groups, len(config.level_widths) - 1
        self.conv_in = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(widths[max(i - 1, 0)], width, config.residual_blocks, groups, downsample=i < last)
            for i, width in enumerate(widths)
        )
        self.middle = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """Latents (b, latent_channels, h, w) -> images (b, image_channels, f h, f w)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, groups, last = config.level_widths[::-1], config.norm_groups, len(config.level_widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.middle = Middle(widths[0], groups)
        self.up = nn.ModuleList(
            UpLevel(widths[max(i - 1, 0)], width, config.residual_blocks + 1, groups, upsample=i < last)
            for i, width in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.image_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.middle(self.conv_in(latents))
        for level in self.up:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    """Images <-> latents *before* `config.scaling_factor`: the UNet's latents are scaling_factor times these."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, images: Tensor) -> Posterior:
        """Images (b, 3, h, w) in [-1, 1], sides multiples of f -> posterior over latents (b, 4, h/f, w/f)."""
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(*LOG_VARIANCE_RANGE))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, 4, h, w) -> images (b, 3, f h, f w), about in [-1, 1] and not clamped."""
        return self.decoder(self.post_quant_conv(latents))
