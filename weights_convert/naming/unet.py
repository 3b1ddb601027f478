"""The denoising UNet's layers in three namings: native, CompVis, diffusers."""

from weights_convert.architecture import UNet
from weights_convert.naming.layers import POINTWISE, Layer, Line, convolution, linear, norm, under

NAMINGS = ("native", "compvis", "diffusers")


def lines(unet: UNet) -> list[Line]:
    """Every layer, in the order data flows through them."""
    width, time_width = unet.level_widths[0], 4 * unet.level_widths[0]
    return [
        ("time_embedding.linear_1", "time_embed.0", "time_embedding.linear_1", linear(width, time_width)),
        ("time_embedding.linear_2", "time_embed.2", "time_embedding.linear_2", linear(time_width, time_width)),
        ("conv_in", "input_blocks.0.0", "conv_in", convolution(unet.in_channels, width)),
        *_down(unet, time_width),
        *_middle(unet, time_width),
        *_up(unet, time_width),
        ("norm_out", "out.0", "conv_norm_out", norm(width)),
        ("conv_out", "out.2", "conv_out", convolution(width, unet.out_channels)),
    ]


def skip_widths(unet: UNet) -> list[int]:
    """Channels of each feature map that the down path keeps for the up path, in the order they are made."""
    widths = [unet.level_widths[0]]
    for level, width in enumerate(unet.level_widths):
        widths += [width] * unet.residual_blocks
        if level < len(unet.level_widths) - 1:
            widths.append(width)
    return widths


def _down(unet: UNet, time_width: int) -> list[Line]:
    """Native counts down blocks from 0; CompVis does too but counts conv_in as the first; diffusers groups by level."""
    found, width, n = [], unet.level_widths[0], 0
    for level, level_width in enumerate(unet.level_widths):
        for i in range(unet.residual_blocks):
            prefixes = f"down.{n}.residual", f"input_blocks.{n + 1}.0", f"down_blocks.{level}.resnets.{i}"
            found += under(prefixes, _residual_block(width, level_width, time_width))
            if unet.attention_levels[level]:
                prefixes = f"down.{n}.attention", f"input_blocks.{n + 1}.1", f"down_blocks.{level}.attentions.{i}"
                found += under(prefixes, _spatial_transformer(level_width, unet.context_width))
            width, n = level_width, n + 1
        if level < len(unet.level_widths) - 1:
            names = f"down.{n}.downsample", f"input_blocks.{n + 1}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            found.append((*names, convolution(width, width)))
            n += 1
    return found


def _middle(unet: UNet, time_width: int) -> list[Line]:
    width = unet.level_widths[-1]
    residual, attention = _residual_block(width, width, time_width), _spatial_transformer(width, unet.context_width)
    return [
        *under(("middle.residual_1", "middle_block.0", "mid_block.resnets.0"), residual),
        *under(("middle.attention", "middle_block.1", "mid_block.attentions.0"), attention),
        *under(("middle.residual_2", "middle_block.2", "mid_block.resnets.1"), residual),
    ]


def _up(unet: UNet, time_width: int) -> list[Line]:
    """CompVis numbers a block's parts by place, so its upsampling is part 1 where there is no attention, else part 2."""
    found, width, n, skips = [], unet.level_widths[-1], 0, skip_widths(unet)
    for up_level, level in enumerate(reversed(range(len(unet.level_widths)))):
        level_width, attends = unet.level_widths[level], unet.attention_levels[level]
        for i in range(unet.residual_blocks + 1):
            prefixes = f"up.{n}.residual", f"output_blocks.{n}.0", f"up_blocks.{up_level}.resnets.{i}"
            found += under(prefixes, _residual_block(width + skips.pop(), level_width, time_width))
            if attends:
                prefixes = f"up.{n}.attention", f"output_blocks.{n}.1", f"up_blocks.{up_level}.attentions.{i}"
                found += under(prefixes, _spatial_transformer(level_width, unet.context_width))
            width, n = level_width, n + 1
        if level > 0:
            compvis = f"output_blocks.{n - 1}.{2 if attends else 1}.conv"
            names = f"up.{n - 1}.upsample", compvis, f"up_blocks.{up_level}.upsamplers.0.conv"
            found.append((*names, convolution(width, width)))
    return found


def _residual_block(inputs: int, outputs: int, time_width: int) -> list[Line]:
    found = [
        ("norm1", "in_layers.0", "norm1", norm(inputs)),
        ("conv1", "in_layers.2", "conv1", convolution(inputs, outputs)),
        ("time_projection", "emb_layers.1", "time_emb_proj", linear(time_width, outputs)),
        ("norm2", "out_layers.0", "norm2", norm(outputs)),
        ("conv2", "out_layers.3", "conv2", convolution(outputs, outputs)),
    ]
    if inputs != outputs:
        found.append(("shortcut", "skip_connection", "conv_shortcut", _pointwise(inputs, outputs)))
    return found


def _spatial_transformer(width: int, context_width: int) -> list[Line]:
    project = _pointwise(width, width)
    block = "block", "transformer_blocks.0", "transformer_blocks.0"
    return [
        ("norm", "norm", "norm", norm(width)),
        ("proj_in", "proj_in", "proj_in", project),
        *under(block, [("norm1", "norm1", "norm1", norm(width))]),
        *under(block, _attention("self_attention", "attn1", width, width)),
        *under(block, [("norm2", "norm2", "norm2", norm(width))]),
        *under(block, _attention("cross_attention", "attn2", width, context_width)),
        *under(block, [("norm3", "norm3", "norm3", norm(width))]),
        *under(block, [("feed_forward.expand", "ff.net.0.proj", "ff.net.0.proj", linear(width, 8 * width))]),
        *under(block, [("feed_forward.reduce", "ff.net.2", "ff.net.2", linear(4 * width, width))]),
        ("proj_out", "proj_out", "proj_out", project),
    ]


def _pointwise(inputs: int, outputs: int) -> Layer:
    """A matrix for every pixel alone: native keeps it as one, the other two as a 1x1 convolution."""
    return linear(inputs, outputs, compvis=POINTWISE, diffusers=POINTWISE)


def _attention(native: str, foreign: str, width: int, context_width: int) -> list[Line]:
    return under(
        (native, foreign, foreign),
        [
            ("query", "to_q", "to_q", linear(width, width, bias=False)),
            ("key", "to_k", "to_k", linear(context_width, width, bias=False)),
            ("value", "to_v", "to_v", linear(context_width, width, bias=False)),
            ("output", "to_out.0", "to_out.0", linear(width, width)),
        ],
    )
