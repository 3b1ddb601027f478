"""The autoencoder, quick: as `unet.py` for the UNet, from the same parts.

A decoder's largest maps have 256 channels at 512 x 512, of which every operation that is not done in place makes another.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.fast.convolutions import Direct, Upsampling, convolution
from ldm.fast.linear import Linear
from ldm.fast.maps import map_of, same_norm, tokens_of
from ldm.fast.normalisation import GroupNormSiLU
from ldm.models import autoencoder as reference
from ldm.models.attention import attention


class Residual(nn.Module):
    """`ResidualBlock` of the autoencoder."""

    def __init__(self, block: reference.ResidualBlock, dtype: torch.dtype, pixels: int, **how: str):
        super().__init__()
        self.norm1, self.norm2 = GroupNormSiLU(block.norm1, dtype), GroupNormSiLU(block.norm2, dtype)
        self.conv1, self.conv2 = (convolution(conv, dtype, pixels, **how) for conv in (block.conv1, block.conv2))
        self.shortcut = None if isinstance(block.shortcut, nn.Identity) else Direct(block.shortcut, dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return h.add_(x if self.shortcut is None else self.shortcut(x))


class Attention(nn.Module):
    """`AttentionBlock`, with queries, keys and values in one product."""

    def __init__(self, block: reference.AttentionBlock, dtype: torch.dtype):
        super().__init__()
        self.norm = same_norm(block.norm, dtype)
        self.query_key_value = Linear(block.query, block.key, block.value, dtype=dtype)
        self.output = Linear(block.output, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.query_key_value(tokens_of(self.norm(x)))[:, None].chunk(3, dim=-1)
        return map_of(self.output(attention(*parts)[:, 0]), x.shape[2]).add_(x)


class Middle(nn.Module):
    """`Middle`."""

    def __init__(self, middle: reference.Middle, dtype: torch.dtype, pixels: int, **how: str):
        super().__init__()
        self.residual_1, self.residual_2 = (
            Residual(block, dtype, pixels, **how) for block in (middle.residual_1, middle.residual_2)
        )
        self.attention = Attention(middle.attention, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual_2(self.attention(self.residual_1(x)))


class Encoder(nn.Module):
    """`Encoder`."""

    def __init__(self, encoder: reference.Encoder, dtype: torch.dtype, side: int, **how: str):
        super().__init__()
        self.conv_in = Direct(encoder.conv_in, dtype)
        sides = [side * 2**level for level in reversed(range(len(encoder.down)))]
        levels = zip(encoder.down, sides, strict=True)
        down = [[Residual(block, dtype, side**2, **how) for block in level.residual] for level, side in levels]
        self.down = nn.ModuleList(map(nn.ModuleList, down))
        downsamples = [level.downsample for level in encoder.down if level.downsample is not None]
        self.downsample = nn.ModuleList(Direct(conv, dtype) for conv in downsamples)
        self.middle = Middle(encoder.middle, dtype, sides[-1] ** 2, **how)
        self.norm_out, self.conv_out = GroupNormSiLU(encoder.norm_out, dtype), Direct(encoder.conv_out, dtype)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images.contiguous(memory_format=torch.channels_last))
        for i, blocks in enumerate(self.down):
            for block in blocks:
                x = block(x)
            if i < len(self.downsample):
                x = self.downsample[i](F.pad(x, (0, 1, 0, 1)))
        return self.conv_out(self.norm_out(self.middle(x)))


class Decoder(nn.Module):
    """`Decoder`."""

    def __init__(self, decoder: reference.Decoder, dtype: torch.dtype, side: int, **how: str):
        super().__init__()
        self.conv_in = Direct(decoder.conv_in, dtype)
        self.middle = Middle(decoder.middle, dtype, side**2, **how)
        levels = [(level.residual, side * 2**i) for i, level in enumerate(decoder.up)]
        up = [[Residual(block, dtype, side**2, **how) for block in blocks] for blocks, side in levels]
        self.up = nn.ModuleList(map(nn.ModuleList, up))
        upsamples = [level.upsample for level in decoder.up if level.upsample is not None]
        self.upsample = nn.ModuleList(Upsampling(conv, dtype) for conv in upsamples)
        self.norm_out, self.conv_out = GroupNormSiLU(decoder.norm_out, dtype), Direct(decoder.conv_out, dtype)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.middle(self.conv_in(latents))
        for i, blocks in enumerate(self.up):
            for block in blocks:
                x = block(x)
            if i < len(self.upsample):
                x = self.upsample[i](x)
        return self.conv_out(self.norm_out(x))


class FastAutoencoder(nn.Module):
    """`ldm.models.autoencoder.Autoencoder`: images <-> latents before `config.scaling_factor`."""

    def __init__(self, autoencoder: reference.Autoencoder, dtype: torch.dtype, *, side: int, winograd: str = "large"):
        """side: of the latents it is made quick for; it takes any."""
        super().__init__()
        self.config = autoencoder.config
        # Text to image has no use for an encoder: it is made when something is first encoded.
        self.make_encoder = lambda: Encoder(autoencoder.encoder, dtype, side, winograd=winograd)
        self.encoder: Encoder | None = None
        self.decoder = Decoder(autoencoder.decoder, dtype, side, winograd=winograd)
        self.quant_conv = Direct(autoencoder.quant_conv, dtype, pack=False)  # whose weights tell device and type
        self.post_quant_conv = Direct(autoencoder.post_quant_conv, dtype, pack=False)

    def encode(self, images: Tensor) -> reference.Posterior:
        """As the reference's."""
        if self.encoder is None:
            self.encoder = self.make_encoder()
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return reference.Posterior(mean, log_variance.clamp(*reference.LOG_VARIANCE_RANGE))

    def decode(self, latents: Tensor) -> Tensor:
        """As the reference's."""
        return self.decoder(self.post_quant_conv(latents.contiguous(memory_format=torch.channels_last)))
