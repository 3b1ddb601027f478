"""The parts of the UNet: time embedding, residual block, spatial transformer. `unet.py` puts them together.

Ho et al. 2020 (arXiv:2006.11239, appendix B) for the residual block, Rombach et al. 2022 (arXiv:2112.10752, appendix E.2) for
the transformer. Letters: b batch, c channels, h w pixels, n tokens (pixels, or words of the text).
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ldm.models.attention import Attention

RESIDUAL_NORM_EPS = 1e-5
TRANSFORMER_NORM_EPS = 1e-6
KeysValues = tuple[Tensor, Tensor]


class Recomputable(nn.Module):
    """A block that may forget what it computed, but for its input and output, and compute it again in the backward pass.

    Chen et al. 2016, arXiv:1604.06174, section 4: memory for a second forward pass. `recompute` is no part of a model: training
    sets it, and no config or file knows it. The gradients are the same numbers.
    """

    recompute = False

    def run(self, *inputs: Tensor | KeysValues) -> Tensor:
        """What calling the block with these inputs gives."""
        if not (self.recompute and torch.is_grad_enabled()):
            return self(*inputs)
        again = {} if torch.compiler.is_compiling() else {"context_fn": _same_attention}  # a compiled graph holds its kernels
        return checkpoint(self, *inputs, use_reentrant=False, preserve_rng_state=False, **again)


def _same_attention() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the two forward passes: the second is to attend with the kernel of the first, whatever is allowed by then."""
    allowed = torch.backends.cuda
    kernels = {
        SDPBackend.MATH: allowed.math_sdp_enabled(),
        SDPBackend.FLASH_ATTENTION: allowed.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: allowed.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: allowed.cudnn_sdp_enabled(),
    }
    return nullcontext(), sdpa_kernel([kernel for kernel, is_allowed in kernels.items() if is_allowed])


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of t at width/2 frequencies from 1 to almost 1/10000: (b,) -> (b, width).

    Vaswani et al. 2017, arXiv:1706.03762, section 3.5, which interleaves sines and cosines. Computed in the precision of t,
    which `embed_time` makes float64: the references' float32 angles, off by a rounding error that grows with t, are most of
    their own error at large t.
    """
    half = width // 2
    frequencies = 10_000.0 ** (-torch.arange(half, dtype=t.dtype, device=t.device) / half)
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """t (b,), fractions allowed -> features (b, time_width)."""

    def __init__(self, width: int, time_width: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, time_width)
        self.linear_2 = nn.Linear(time_width, time_width)

    def forward(self, t: Tensor) -> Tensor:
        waves = timestep_embedding(t, self.linear_1.in_features).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class Shortcut(nn.Linear):
    """A 1x1 convolution, written as the matrix product that it is: (b, in, h, w) -> (b, out, h, w).

    It carries the residual stream past a block and sums up to 2560 channels for every pixel. On the CPU a float32 model sums
    them in float64: next to no time, and a fifth less float32 error of the whole UNet (`tests/test_parity_full_size.py`).
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float32 and x.device.type == "cpu" else x.dtype
        pixels = self.weight.to(wide) @ x.flatten(2).to(wide) + self.bias.to(wide)[:, None]
        return rearrange(pixels.to(x.dtype), "b c (h w) -> b c h w", h=x.shape[2])


class ResidualBlock(Recomputable):
    """x (b, in, h, w), time projection (b, out, 1, 1) -> (b, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, time_width: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=RESIDUAL_NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_projection = nn.Linear(time_width, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=RESIDUAL_NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else Shortcut(in_channels, out_channels)

    def project_time(self, features: Tensor) -> Tensor:
        """Features of the time embedding (b, time_width) -> what this block adds to every pixel (b, out, 1, 1)."""
        return rearrange(self.time_projection(F.silu(features)), "b c -> b c 1 1")

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + time
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class FeedForward(nn.Module):
    """Gated feed-forward layer, GEGLU (Shazeer 2020, arXiv:2002.05202, eq. 6): (b, n, width) -> (b, n, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.expand = nn.Linear(width, 8 * width)
        self.reduce = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.expand(x).chunk(2, dim=-1)
        return self.reduce(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Attention among the pixels, attention to the text, feed-forward: tokens (b, n, width) -> (b, n, width)."""

    def __init__(self, width: int, heads: int, context_width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads, context_width, bias=False)
        self.norm3 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        x = x + self.self_attention(self.norm1(x))
        x = x + self.cross_attention(self.norm2(x), keys_values)
        return x + self.feed_forward(self.norm3(x))


class SpatialTransformer(Recomputable):
    """A transformer block over the pixels of a feature map: (b, c, h, w) -> (b, c, h, w)."""

    def __init__(self, channels: int, heads: int, context_width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=TRANSFORMER_NORM_EPS)
        self.proj_in = nn.Linear(channels, channels)  # 1x1 convolutions in the references
        self.block = TransformerBlock(channels, heads, context_width)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        tokens = self.proj_out(self.block(self.proj_in(tokens), keys_values))
        return x + rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2])
