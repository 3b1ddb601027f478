"""The denoising UNet with cross-attention: latents, timestep, text -> the noise eps in the latents.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752, section 3.3 and
appendix E.2; the backbone is Ho et al. 2020 (arXiv:2006.11239, appendix B) as widened by Dhariwal & Nichol 2021
(arXiv:2105.05233). x (b, 4, h, w), t (b,) or a number, context (b, n, 768) -> eps (b, 4, h, w).

SD v1 as a table, for latents 64 x 64 (`table(config)` prints it for any config):

    block     channels              map        parts
    conv_in   4 -> 320              64
    down.0    320 -> 320            64         residual, attention
    down.1    320 -> 320            64         residual, attention
    down.2    320 -> 320            64 -> 32   downsample
    down.3    320 -> 640            32         residual, attention
    down.4    640 -> 640            32         residual, attention
    down.5    640 -> 640            32 -> 16   downsample
    down.6    640 -> 1280           16         residual, attention
    down.7    1280 -> 1280          16         residual, attention
    down.8    1280 -> 1280          16 -> 8    downsample
    down.9    1280 -> 1280          8          residual
    down.10   1280 -> 1280          8          residual
    middle    1280 -> 1280          8          residual, attention, residual
    up.0      1280 + 1280 -> 1280   8          residual
    up.1      1280 + 1280 -> 1280   8          residual
    up.2      1280 + 1280 -> 1280   8 -> 16    residual, upsample
    up.3      1280 + 1280 -> 1280   16         residual, attention
    up.4      1280 + 1280 -> 1280   16         residual, attention
    up.5      1280 + 640 -> 1280    16 -> 32   residual, attention, upsample
    up.6      1280 + 640 -> 640     32         residual, attention
    up.7      640 + 640 -> 640      32         residual, attention
    up.8      640 + 320 -> 640      32 -> 64   residual, attention, upsample
    up.9      640 + 320 -> 320      64         residual, attention
    up.10     320 + 320 -> 320      64         residual, attention
    up.11     320 + 320 -> 320      64         residual, attention
    conv_out  320 -> 4              64
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.unet_blocks import (
    RESIDUAL_NORM_EPS,
    KeysValues,
    Recomputable,
    ResidualBlock,
    SpatialTransformer,
    TimeEmbedding,
    TransformerBlock,
)


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """SD v1's UNet. Levels run from the finest resolution to the coarsest, each half the one before.

    `sample_size`: the side of the latents it was trained on, and so what size pictures have by default; it takes any.
    """

    in_channels: int = 4
    out_channels: int = 4
    level_widths: tuple[int, ...] = (320, 640, 1280, 1280)
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    residual_blocks: int = 2
    heads: int = 8
    context_width: int = 768
    norm_groups: int = 32
    sample_size: int = 64

    @property
    def time_width(self) -> int:
        """Features of the time embedding."""
        return 4 * self.level_widths[0]


# -- The structure -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One block of the UNet. A block with `resample == "down"` is nothing but that strided convolution."""

    name: str
    level: int
    in_channels: int
    skip_channels: int  # joined to the input; 0 on the way down
    out_channels: int
    attention: bool
    resample: str  # "", "down" or "up"


def down_rows(config: UNetConfig) -> list[Row]:
    """The blocks of the way down. The output of each, and of conv_in before them, is kept for the way up."""
    rows, channels = [], config.level_widths[0]
    for level, width in enumerate(config.level_widths):
        for _ in range(config.residual_blocks):
            rows.append(Row(f"down.{len(rows)}", level, channels, 0, width, config.attention_levels[level], ""))
            channels = width
        if level < len(config.level_widths) - 1:
            rows.append(Row(f"down.{len(rows)}", level, width, 0, width, False, "down"))
    return rows


def up_rows(config: UNetConfig) -> list[Row]:
    """The blocks of the way up, each joined with the last kept output not yet used."""
    skips = [config.level_widths[0]] + [row.out_channels for row in down_rows(config)]
    rows, channels = [], config.level_widths[-1]
    for level in reversed(range(len(config.level_widths))):
        width, attends = config.level_widths[level], config.attention_levels[level]
        for i in range(config.residual_blocks + 1):
            resample = "up" if level > 0 and i == config.residual_blocks else ""
            rows.append(Row(f"up.{len(rows)}", level, channels, skips.pop(), width, attends, resample))
            channels = width
    return rows


def table(config: UNetConfig, size: int = 64) -> str:
    """The structure as text, one block a line, with the side of its feature map for latents size x size."""
    width, bottom = config.level_widths[0], config.level_widths[-1]
    lines = [f"{'block':<10}{'channels':<22}{'map':<11}parts", f"{'conv_in':<10}{f'{config.in_channels} -> {width}':<22}{size}"]
    for row in down_rows(config):
        lines.append(_table_line(row, size))
    bottom_size = _side(size, len(config.level_widths) - 1)
    lines.append(f"{'middle':<10}{f'{bottom} -> {bottom}':<22}{bottom_size:<11}residual, attention, residual")
    for row in up_rows(config):
        lines.append(_table_line(row, size))
    lines.append(f"{'conv_out':<10}{f'{width} -> {config.out_channels}':<22}{size}")
    return "\n".join(line.rstrip() for line in lines)


def _side(size: int, level: int) -> int:
    """The side of a level's feature map: each level halves, rounding up."""
    return -(-size // 2**level)


def _table_line(row: Row, size: int) -> str:
    before = _side(size, row.level)
    after = _side(size, row.level + {"": 0, "down": 1, "up": -1}[row.resample])
    channels = f"{row.in_channels}{f' + {row.skip_channels}' if row.skip_channels else ''} -> {row.out_channels}"
    parts = ["residual"] * (row.resample != "down") + ["attention"] * row.attention
    parts += {"": [], "down": ["downsample"], "up": ["upsample"]}[row.resample]
    sizes = f"{before}" if after == before else f"{before} -> {after}"
    return f"{row.name:<10}{channels:<22}{sizes:<11}{', '.join(parts)}"


# -- The model ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """One row of the table: x (b, in + skip, h, w) -> (b, out, h', w').

    Takes the next of `times` for its residual block and the next of `contexts` for its attention, where it has them.
    """

    def __init__(self, row: Row, config: UNetConfig):
        super().__init__()
        inputs, width, groups = row.in_channels + row.skip_channels, row.out_channels, config.norm_groups
        self.residual = None if row.resample == "down" else ResidualBlock(inputs, width, config.time_width, groups)
        self.attention = SpatialTransformer(width, config.heads, config.context_width, groups) if row.attention else None
        self.downsample = nn.Conv2d(width, width, 3, stride=2, padding=1) if row.resample == "down" else None
        self.upsample = nn.Conv2d(width, width, 3, padding=1) if row.resample == "up" else None

    def forward(
        self, x: Tensor, times: Iterator[Tensor], contexts: Iterator[KeysValues], size: torch.Size | None = None
    ) -> Tensor:
        if self.residual is not None:
            x = self.residual.run(x, next(times))
        if self.attention is not None:
            x = self.attention.run(x, next(contexts))
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:  # to the size of the next skip connection, which is odd for some latents
            x = self.upsample(F.interpolate(x, size=size, mode="nearest"))
        return x


class Middle(nn.Module):
    """The coarsest level: residual, attention, residual."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        width, groups = config.level_widths[-1], config.norm_groups
        self.residual_1 = ResidualBlock(width, width, config.time_width, groups)
        self.attention = SpatialTransformer(width, config.heads, config.context_width, groups)
        self.residual_2 = ResidualBlock(width, width, config.time_width, groups)

    def forward(self, x: Tensor, times: Iterator[Tensor], contexts: Iterator[KeysValues]) -> Tensor:
        x = self.residual_1.run(x, next(times))
        x = self.attention.run(x, next(contexts))
        return self.residual_2.run(x, next(times))


class UNet(nn.Module):
    """x (b, in_channels, h, w), t (b,) or a number, context (b, n, context_width) -> eps (b, out_channels, h, w).

    Split at its seams, so that a sampler can compute once what does not change from step to step:
    `unet(x, t, context) == unet.denoise(x, unet.embed_time(t), unet.project_context(context))`.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        width = config.level_widths[0]
        self.time_embedding = TimeEmbedding(width, config.time_width)
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.down = nn.ModuleList(Block(row, config) for row in down_rows(config))
        self.middle = Middle(config)
        self.up = nn.ModuleList(Block(row, config) for row in up_rows(config))
        self.norm_out = nn.GroupNorm(config.norm_groups, width, eps=RESIDUAL_NORM_EPS)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor | float, context: Tensor) -> Tensor:
        return self.denoise(x, self.embed_time(t), self.project_context(context))

    def checkpoint_gradients(self, on: bool = True) -> None:
        """Whether training computes the inside of every block twice rather than keep it; see `Recomputable`."""
        for module in self.modules():
            if isinstance(module, Recomputable):
                module.recompute = on

    def embed_time(self, t: Tensor | float) -> list[Tensor]:
        """Every residual block's time projection, (b, c, 1, 1) each, in the order `denoise` uses them.

        t: timesteps in [0, train_steps), fractions allowed, one for each sample (b,) or one for all.
        """
        device = self.conv_in.weight.device
        precise = torch.float32 if device.type == "mps" else torch.float64  # that device has no float64
        features = self.time_embedding(torch.as_tensor(t, dtype=precise, device=device).reshape(-1))
        return [module.project_time(features) for module in self.modules() if isinstance(module, ResidualBlock)]

    def project_context(self, context: Tensor) -> list[KeysValues]:
        """Every cross-attention's keys and values, (b, heads, n, d) each, in the order `denoise` uses them."""
        blocks = [module for module in self.modules() if isinstance(module, TransformerBlock)]
        return [block.cross_attention.keys_values(context) for block in blocks]

    def denoise(self, x: Tensor, times: Sequence[Tensor], contexts: Sequence[KeysValues]) -> Tensor:
        """The network proper, given what `embed_time` and `project_context` returned.

        x may be of fewer samples than the contexts, b of k b: it is then repeated for them, (k b, ...), as guidance asks about
        one x under two contexts. The times must be one for all, or as many as the contexts.
        """
        x = x.repeat(len(contexts[0][0]) // len(x), 1, 1, 1)
        times, contexts = iter(times), iter(contexts)  # each block takes its own, in the order of the modules
        x = self.conv_in(x)
        skips = [x]
        for block in self.down:
            x = block(x, times, contexts)
            skips.append(x)
        x = self.middle(x, times, contexts)
        for block in self.up:
            x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, times, contexts, size=skips[-1].shape[-2:] if skips else None)
        return self.conv_out(F.silu(self.norm_out(x)))
