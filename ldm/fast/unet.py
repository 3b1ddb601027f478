"""The UNet, quick: the same arithmetic as `ldm.models.unet`, made from a loaded one, in an order that costs less.

What is done otherwise, and exact but for rounding:

- maps are channels_last, so that a map's pixels are tokens without a copy;
- convolutions have their weights laid out once, on a CPU mostly through Winograd's transform (`convolutions.py`);
- upsampling is part of the convolution after it;
- the time projections of all residual blocks are one product, and are added in the convolutions' biases;
- queries, keys and values are one product;
- the gated feed-forward layer goes through the tokens in parts, in place;
- where both halves of guidance ask about one x, everything before the first look at the text is computed once.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.fast.convolutions import Direct, Normalised, Upsampling, convolution
from ldm.fast.linear import GatedLinear, Linear
from ldm.fast.maps import as_many, map_of, tokens_of
from ldm.fast.normalisation import GroupNorm, LayerNorm
from ldm.fast.plan import Plan
from ldm.fast.token_merging import Merging
from ldm.models import unet as reference
from ldm.models.unet_blocks import FeedForward, KeysValues, ResidualBlock, SpatialTransformer, TransformerBlock

TIMES = 128  # whose projections are kept: pictures after the first ask for the same
PART = 1 << 21  # elements of the feed-forward layer's inside at a time on a CPU: what stays in its caches


class Residual(nn.Module):
    """`ResidualBlock`. times: of one sample for all (1, c), or of each (b, c)."""

    def __init__(self, block: ResidualBlock, plan: Plan, pixels: int):
        super().__init__()
        self.conv1 = Normalised(block.norm1, block.conv1, plan, pixels)
        self.conv2 = Normalised(block.norm2, block.conv2, plan, pixels)
        self.shortcut = None if isinstance(block.shortcut, nn.Identity) else Linear(block.shortcut, plan=plan)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        if len(time) == 1:
            h = self.conv1(x, self.conv1.bias + time[0])
        else:
            h = self.conv1(x).add_(as_many(time, len(x))[..., None, None])
        return self.conv2(h, addend=x if self.shortcut is None else map_of(self.shortcut(tokens_of(x)), x.shape[2]))


class GatedFeedForward(nn.Module):
    """`FeedForward`, on a CPU without a matrix engine in parts, so that its inside, four times as wide as its input, stays in
    the caches."""

    def __init__(self, block: FeedForward, plan: Plan):
        super().__init__()
        self.expand, self.reduce = GatedLinear(block.expand, plan), Linear(block.reduce, plan=plan)
        self.part = max(1, PART // block.reduce.in_features)

    def forward(self, x: Tensor, addend: Tensor) -> Tensor:
        """x, addend (b, n, d) -> (b, n, d)."""
        rows = x.flatten(0, 1)
        if self.expand.tiled or x.device.type != "cpu" or len(rows) <= self.part:
            return self.reduce(self.expand(x), addend=addend)
        parts = zip(rows.split(self.part), addend.flatten(0, 1).split(self.part), strict=True)
        return torch.cat([self.reduce(self.expand(some), addend=more) for some, more in parts]).view_as(x)


class Transformer(nn.Module):
    """`SpatialTransformer`: a map (b, c, h, w) -> (k b, c, h, w), where the context's keys are of k b samples."""

    def __init__(self, block: SpatialTransformer, plan: Plan):
        super().__init__()
        inner: TransformerBlock = block.block
        self.heads, self.attend, self.merge_tokens = inner.self_attention.heads, plan.attend, plan.merge_tokens
        self.norm = GroupNorm(block.norm, plan, silu=False)
        self.norms = nn.ModuleList(LayerNorm(norm, plan) for norm in (inner.norm1, inner.norm2, inner.norm3))
        own, other = inner.self_attention, inner.cross_attention
        self.proj_in, self.proj_out = Linear(block.proj_in, plan=plan), Linear(block.proj_out, plan=plan)
        self.query_key_value = Linear(own.query, own.key, own.value, plan=plan)
        self.output = Linear(own.output, plan=plan)
        self.cross_query, self.cross_output = Linear(other.query, plan=plan), Linear(other.output, plan=plan)
        self.feed_forward = GatedFeedForward(inner.feed_forward, plan)

    def forward(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        tokens = self.proj_in(tokens_of(self.norm(x)))
        normed = self.norms[0](tokens)
        merging = Merging(normed, x.shape[2], self.merge_tokens) if self.merge_tokens else None
        parts = self.query_key_value(normed if merging is None else merging.merge(normed)).chunk(3, dim=-1)
        attended = self._merge(self.attend(*map(self._split, parts)))
        if merging is None:
            tokens = self.output(attended, addend=tokens)
        else:
            tokens = merging.unmerge(self.output(attended)).add_(tokens)
        count = len(keys_values[0])
        query = as_many(self._split(self.cross_query(self.norms[1](tokens))), count)
        attended = self._merge(self.attend(query, *keys_values))
        tokens = self.cross_output(attended, addend=as_many(tokens, count))
        tokens = self.feed_forward(self.norms[2](tokens), addend=tokens)
        return map_of(self.proj_out(tokens, addend=as_many(tokens_of(x), count)), x.shape[2])

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _merge(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)


class Block(nn.Module):
    """`ldm.models.unet.Block`: the next of `times` and of `contexts` are taken where the block has use for them."""

    def __init__(self, block: reference.Block, plan: Plan, pixels: int):
        super().__init__()
        self.residual = None if block.residual is None else Residual(block.residual, plan, pixels)
        self.attention = None if block.attention is None else Transformer(block.attention, plan)
        self.downsample = None if block.downsample is None else convolution(block.downsample, plan, pixels)
        self.upsample = None if block.upsample is None else Upsampling(block.upsample, plan, 4 * pixels)

    def forward(self, x: Tensor, times, contexts, size: torch.Size | None = None) -> Tensor:
        if self.residual is not None:
            x = self.residual(x, next(times))
        if self.attention is not None:
            x = self.attention(x, next(contexts))
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x, size)
        return x


class FastUNet(nn.Module):
    """`ldm.models.unet.UNet`, with the same seams. It shares the weights that need no other layout, and changes none."""

    def __init__(self, unet: reference.UNet, plan: Plan, *, side: int | None = None):
        """side: of the latents it is made quick for, and takes any; those it was trained on where left out."""
        super().__init__()
        self.config, dtype, side = unet.config, plan.dtype, side or unet.config.sample_size
        blocks = [module for module in unet.modules() if isinstance(module, ResidualBlock)]
        self.time_embedding = (
            unet.time_embedding if unet.conv_in.weight.dtype == dtype else deepcopy(unet.time_embedding).to(dtype)
        )
        self.time_projection = Linear(*(block.time_projection for block in blocks), plan=plan)
        self.times: dict[tuple[float, ...], list[Tensor]] = {}
        self.time_widths = [block.time_projection.out_features for block in blocks]
        crosses = [module.cross_attention for module in unet.modules() if isinstance(module, TransformerBlock)]
        self.context_projections = nn.ModuleList(Linear(cross.key, cross.value, plan=plan) for cross in crosses)
        self.conv_in = Direct(unet.conv_in, plan.dtype, pack=False)  # whose weight tells device and type
        sizes = [2 * (side // 2**level) ** 2 for level in range(len(unet.config.level_widths))]  # pixels, with guidance
        plans = plan, dataclasses.replace(plan, merge_tokens=0.0)  # which is for the largest maps
        rows = reference.down_rows(unet.config), reference.up_rows(unet.config)
        down, up = (
            [Block(block, plans[row.level > 0], sizes[row.level]) for block, row in zip(blocks, of, strict=True)]
            for blocks, of in zip((unet.down, unet.up), rows, strict=True)
        )
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self.residual_1 = Residual(unet.middle.residual_1, plan, sizes[-1])
        self.attention = Transformer(unet.middle.attention, dataclasses.replace(plan, merge_tokens=0.0))
        self.residual_2 = Residual(unet.middle.residual_2, plan, sizes[-1])
        self.conv_out = Normalised(unet.norm_out, unet.conv_out, plan, sizes[0])

    def forward(self, x: Tensor, t: Tensor | float, context: Tensor) -> Tensor:
        return self.denoise(x, self.embed_time(t), self.project_context(context))

    def embed_time(self, t: Tensor | float) -> list[Tensor]:
        """Every residual block's time projection, (1, c) or (b, c) each; those of the last times are kept."""
        precise = torch.as_tensor(t, dtype=torch.float64).reshape(-1)
        if precise.device.type != "cpu":  # whose value is not asked for
            return self._embedded(precise)
        key = tuple(precise.tolist())
        if key not in self.times:
            while len(self.times) >= TIMES:
                del self.times[next(iter(self.times))]
            self.times[key] = self._embedded(precise.to(self.conv_in.bias.device))
        return self.times[key]

    def _embedded(self, t: Tensor) -> list[Tensor]:
        projected = self.time_projection(F.silu(self.time_embedding(t)))
        return list(projected.split(self.time_widths, dim=-1))

    def project_context(self, context: Tensor) -> list[KeysValues]:
        """Every cross-attention's keys and values, (b, heads, n, d) each, contiguous."""
        heads = self.config.heads
        pairs = [projection(context).chunk(2, dim=-1) for projection in self.context_projections]
        return [tuple(part.unflatten(-1, (heads, -1)).transpose(1, 2).contiguous() for part in pair) for pair in pairs]

    def denoise(self, x: Tensor, times: list[Tensor], contexts: list[KeysValues]) -> Tensor:
        """As the reference's, which see. x may be of fewer samples than the contexts: they then share it."""
        times, contexts, count = iter(times), iter(contexts), len(contexts[0][0])
        skips = self.descend(x, self.down, times, contexts)
        x = self.middle(skips[-1], times, contexts)
        return self.conv_out(self.ascend(x, self.up, skips, count, times, contexts))

    def descend(self, x: Tensor, blocks: Iterable[Block], times: Iterator, contexts: Iterator) -> list[Tensor]:
        """What the first convolution and each of the blocks made."""
        skips = [self.conv_in(x.contiguous(memory_format=torch.channels_last))]
        for block in blocks:
            skips.append(block(skips[-1], times, contexts))
        return skips

    def middle(self, x: Tensor, times: Iterator, contexts: Iterator) -> Tensor:
        x = self.residual_1(x, next(times))
        x = self.attention(x, next(contexts))
        return self.residual_2(x, next(times))

    def ascend(
        self, x: Tensor, blocks: Iterable[Block], skips: list[Tensor], count: int, times: Iterator, contexts: Iterator
    ) -> Tensor:
        """Each of the blocks takes the last of the skips, for `count` samples."""
        for block in blocks:
            x = torch.cat([x, as_many(skips.pop(), count)], dim=1)
            x = block(x, times, contexts, size=skips[-1].shape[-2:] if skips else None)
        return x
