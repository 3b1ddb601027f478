"""The KL autoencoder's layers in four namings: native, CompVis, diffusers, and diffusers before 0.16 ("diffusers-old")."""

from weights_convert.architecture import Autoencoder
from weights_convert.naming.layers import POINTWISE, Line, convolution, linear, norm, under

NAMINGS = ("native", "compvis", "diffusers", "diffusers-old")


def lines(autoencoder: Autoencoder) -> list[Line]:
    """Every layer, encoder first, in the order data flows through them."""
    latent = autoencoder.latent_channels
    return [
        *under(("encoder",) * 4, _encoder(autoencoder)),
        *_same("quant_conv", convolution(2 * latent, 2 * latent, kernel=1)),
        *_same("post_quant_conv", convolution(latent, latent, kernel=1)),
        *under(("decoder",) * 4, _decoder(autoencoder)),
    ]


def _same(name: str, layer) -> list[Line]:
    return [(name, name, name, name, layer)]


def _encoder(autoencoder: Autoencoder) -> list[Line]:
    widths = autoencoder.level_widths
    found = _same("conv_in", convolution(autoencoder.image_channels, widths[0]))
    width, last = widths[0], len(widths) - 1
    for level, level_width in enumerate(widths):
        for i in range(autoencoder.residual_blocks):
            diffusers = f"down_blocks.{level}.resnets.{i}"
            prefixes = f"down.{level}.residual.{i}", f"down.{level}.block.{i}", diffusers, diffusers
            found += under(prefixes, _residual_block(width, level_width))
            width = level_width
        if level < last:
            diffusers = f"down_blocks.{level}.downsamplers.0.conv"
            names = f"down.{level}.downsample", f"down.{level}.downsample.conv", diffusers, diffusers
            found.append((*names, convolution(width, width)))
    return found + _middle(width) + _head(width, 2 * autoencoder.latent_channels)


def _decoder(autoencoder: Autoencoder) -> list[Line]:
    """Native and diffusers count up from the coarsest level, CompVis from the finest."""
    widths = autoencoder.level_widths
    found = _same("conv_in", convolution(autoencoder.latent_channels, widths[-1])) + _middle(widths[-1])
    width = widths[-1]
    for up, level in enumerate(reversed(range(len(widths)))):
        for i in range(autoencoder.residual_blocks + 1):
            diffusers = f"up_blocks.{up}.resnets.{i}"
            prefixes = f"up.{up}.residual.{i}", f"up.{level}.block.{i}", diffusers, diffusers
            found += under(prefixes, _residual_block(width, widths[level]))
            width = widths[level]
        if level > 0:
            diffusers = f"up_blocks.{up}.upsamplers.0.conv"
            names = f"up.{up}.upsample", f"up.{level}.upsample.conv", diffusers, diffusers
            found.append((*names, convolution(width, width)))
    return found + _head(width, autoencoder.image_channels)


def _head(width: int, outputs: int) -> list[Line]:
    return [
        ("norm_out", "norm_out", "conv_norm_out", "conv_norm_out", norm(width)),
        *_same("conv_out", convolution(width, outputs)),
    ]


def _middle(width: int) -> list[Line]:
    first, attention, second = (
        ("middle.residual_1", "mid.block_1", "mid_block.resnets.0", "mid_block.resnets.0"),
        ("middle.attention", "mid.attn_1", "mid_block.attentions.0", "mid_block.attentions.0"),
        ("middle.residual_2", "mid.block_2", "mid_block.resnets.1", "mid_block.resnets.1"),
    )
    block = _residual_block(width, width)
    return under(first, block) + under(attention, _attention(width)) + under(second, block)


def _attention(width: int) -> list[Line]:
    """One head over all pixels. CompVis stores the four matrices as 1x1 convolutions, the others as linear layers."""
    matrix = linear(width, width, compvis=POINTWISE)
    return [
        ("norm", "norm", "group_norm", "group_norm", norm(width)),
        ("query", "q", "to_q", "query", matrix),
        ("key", "k", "to_k", "key", matrix),
        ("value", "v", "to_v", "value", matrix),
        ("output", "proj_out", "to_out.0", "proj_attn", matrix),
    ]


def _residual_block(inputs: int, outputs: int) -> list[Line]:
    found = [
        *_same("norm1", norm(inputs)),
        *_same("conv1", convolution(inputs, outputs)),
        *_same("norm2", norm(outputs)),
        *_same("conv2", convolution(outputs, outputs)),
    ]
    if inputs != outputs:
        shortcut = convolution(inputs, outputs, kernel=1)
        found.append(("shortcut", "nin_shortcut", "conv_shortcut", "conv_shortcut", shortcut))
    return found
