"""The autoencoder, quick: as `unet.py` for the UNet, from the same parts.

A decoder's largest maps have 256 channels at 512 x 512, of which every operation that is not done in place makes another.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.fast.convolutions import Direct, Normalised, Upsampling
from ldm.fast.linear import Linear
from ldm.fast.maps import map_of, tokens_of
from ldm.fast.normalisation import GroupNorm
from ldm.fast.plan import Plan
from ldm.models import autoencoder as reference


class Residual(nn.Module):
    """`ResidualBlock` of the autoencoder."""

    def __init__(self, block: reference.ResidualBlock, plan: Plan, pixels: int):
        super().__init__()
        self.conv1 = Normalised(block.norm1, block.conv1, plan, pixels)
        self.conv2 = Normalised(block.norm2, block.conv2, plan, pixels)
        self.shortcut = None if isinstance(block.shortcut, nn.Identity) else Direct(block.shortcut, plan.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x), addend=x if self.shortcut is None else self.shortcut(x))


class Attention(nn.Module):
    """`AttentionBlock`, with queries, keys and values in one product."""

    def __init__(self, block: reference.AttentionBlock, plan: Plan):
        super().__init__()
        self.norm, self.attend = GroupNorm(block.norm, plan, silu=False), plan.attend
        self.query_key_value = Linear(block.query, block.key, block.value, plan=plan)
        self.output = Linear(block.output, plan=plan)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.query_key_value(tokens_of(self.norm(x)))[:, None].chunk(3, dim=-1)
        return map_of(self.output(self.attend(*parts)[:, 0], addend=tokens_of(x)), x.shape[2])


class Middle(nn.Module):
    """`Middle`."""

    def __init__(self, middle: reference.Middle, plan: Plan, pixels: int):
        super().__init__()
        self.residual_1, self.residual_2 = (Residual(block, plan, pixels) for block in (middle.residual_1, middle.residual_2))
        self.attention = Attention(middle.attention, plan)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual_2(self.attention(self.residual_1(x)))


class Encoder(nn.Module):
    """`Encoder`."""

    def __init__(self, encoder: reference.Encoder, plan: Plan, side: int):
        super().__init__()
        self.conv_in = Direct(encoder.conv_in, plan.dtype)
        sides = [side * 2**level for level in reversed(range(len(encoder.down)))]
        levels = zip(encoder.down, sides, strict=True)
        down = [[Residual(block, plan, side**2) for block in level.residual] for level, side in levels]
        self.down = nn.ModuleList(map(nn.ModuleList, down))
        downsamples = [level.downsample for level in encoder.down if level.downsample is not None]
        self.downsample = nn.ModuleList(Direct(conv, plan.dtype) for conv in downsamples)
        self.middle = Middle(encoder.middle, plan, sides[-1] ** 2)
        self.conv_out = Normalised(encoder.norm_out, encoder.conv_out, plan, sides[-1] ** 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images.contiguous(memory_format=torch.channels_last))
        for i, blocks in enumerate(self.down):
            for block in blocks:
                x = block(x)
            if i < len(self.downsample):
                x = self.downsample[i](F.pad(x, (0, 1, 0, 1)))
        return self.conv_out(self.middle(x))


class Decoder(nn.Module):
    """`Decoder`."""

    def __init__(self, decoder: reference.Decoder, plan: Plan, side: int):
        super().__init__()
        self.conv_in = Direct(decoder.conv_in, plan.dtype)
        self.middle = Middle(decoder.middle, plan, side**2)
        levels = [(level.residual, side * 2**i) for i, level in enumerate(decoder.up)]
        up = [[Residual(block, plan, side**2) for block in blocks] for blocks, side in levels]
        self.up = nn.ModuleList(map(nn.ModuleList, up))
        upsamples = [(level.upsample, side * 2**i) for i, level in enumerate(decoder.up) if level.upsample is not None]
        self.upsample = nn.ModuleList(Upsampling(conv, plan, (2 * side) ** 2) for conv, side in upsamples)
        self.conv_out = Normalised(decoder.norm_out, decoder.conv_out, plan, levels[-1][1] ** 2)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.middle(self.conv_in(latents))
        for i, blocks in enumerate(self.up):
            for block in blocks:
                x = block(x)
            if i < len(self.upsample):
                x = self.upsample[i](x)
        return self.conv_out(x)


class FastAutoencoder(nn.Module):
    """`ldm.models.autoencoder.Autoencoder`: images <-> latents before `config.scaling_factor`."""

    def __init__(self, autoencoder: reference.Autoencoder, plan: Plan, *, side: int):
        """side: of the latents it is made quick for; it takes any."""
        super().__init__()
        self.config = autoencoder.config
        # Text to image has no use for an encoder: it is made when something is first encoded.
        self.make_encoder = lambda: Encoder(autoencoder.encoder, plan, side)
        self.encoder: Encoder | None = None
        self.decoder = Decoder(autoencoder.decoder, plan, side)
        self.quant_conv = Direct(autoencoder.quant_conv, plan.dtype, pack=False)  # whose weights tell device and type
        self.post_quant_conv = Direct(autoencoder.post_quant_conv, plan.dtype, pack=False)

    def encode(self, images: Tensor) -> reference.Posterior:
        """As the reference's."""
        if self.encoder is None:
            self.encoder = self.make_encoder()
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return reference.Posterior(mean, log_variance.clamp(*reference.LOG_VARIANCE_RANGE))

    def decode(self, latents: Tensor) -> Tensor:
        """As the reference's."""
        return self.decoder(self.post_quant_conv(latents.contiguous(memory_format=torch.channels_last)))
