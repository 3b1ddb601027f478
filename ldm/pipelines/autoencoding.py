"""Pictures <-> the UNet's latents, image by image, and in overlapping tiles where a picture is too large for one pass.

The UNet's latents are `scaling_factor` times the autoencoder's. Taking one image at a time bounds memory and changes nothing;
tiles do change the picture a little, since the autoencoder's norms and its attention look at the whole of what they are given.
"""

import torch
from PIL import Image
from torch import Tensor

from ldm import images
from ldm.checkpoint import Components
from ldm.models.autoencoder import Autoencoder, Posterior

OVERLAP = 4  # a tile shares about a fourth of its side, or more, with the next


def encode(autoencoder: Autoencoder, pixels: Tensor, tile: int | None = None) -> Posterior:
    """Pixels (b, 3, H, W) in [-1, 1] -> the posterior over the *autoencoder's* latents (b, 4, h, w), float32 at least.

    tile: side of a tile, in pixels. Raises ValueError where the result holds NaN.
    """
    weight, factor = autoencoder.quant_conv.weight, autoencoder.config.downsampling

    def moments(part: Tensor) -> Tensor:
        posterior = autoencoder.encode(part)
        return _wide(torch.cat([posterior.mean, posterior.log_variance], dim=1))

    rows = torch.cat([_tiled(moments, row[None].to(weight), tile, 1 / factor, factor) for row in pixels])
    if rows.isnan().any():
        raise ValueError(f"the encoded image holds NaN; {hint(weight.dtype)}")
    return Posterior(*rows.chunk(2, dim=1))


def hint(dtype: torch.dtype) -> str:
    """What to do about NaN."""
    narrow = dtype == torch.float16
    return "float16 is too narrow for this model; try bfloat16 or float32" if narrow else "the model's weights may be damaged"


def decode(autoencoder: Autoencoder, latents: Tensor, tile: int | None = None) -> Tensor:
    """The UNet's latents (b, 4, h, w) -> pixels (b, 3, H, W), about in [-1, 1], float32 at least. tile: in pixels."""
    weight, factor = autoencoder.post_quant_conv.weight, autoencoder.config.downsampling
    scaled = latents / autoencoder.config.scaling_factor
    side = None if tile is None else tile // factor
    return torch.cat([_tiled(lambda x: _wide(autoencoder.decode(x)), x[None].to(weight), side, factor, 1) for x in scaled])


def pictures(components: Components, latents: Tensor, tile: int | None = None) -> list[Image.Image]:
    """The pictures of the UNet's latents (b, 4, h, w): of a result, or of what a hook sees on the way (`info.x0`)."""
    with torch.no_grad():
        return images.to_images(decode(components.autoencoder, latents, tile))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _tiled(function, x: Tensor, side: int | None, scale: float, unit: int) -> Tensor:
    """function(x), in tiles of `side` where x is larger, weighted so that each fades towards its edges.

    scale: the side of function's output for a side of 1. unit: tiles begin at its multiples.
    """
    height, width = x.shape[-2:]
    if side is None or (height <= side and width <= side):
        return function(x)
    total = weights = None
    for top in _starts(height, side, unit):
        for left in _starts(width, side, unit):
            part = function(x[..., top : top + side, left : left + side])
            fade = _fade(part.shape[-2]).to(part)[:, None] * _fade(part.shape[-1]).to(part)
            if total is None:
                total = part.new_zeros(*part.shape[:-2], int(height * scale), int(width * scale))
                weights = torch.zeros_like(total[:1, :1])
            at = (..., slice(int(top * scale), None), slice(int(left * scale), None))
            total[at][..., : part.shape[-2], : part.shape[-1]] += fade * part
            weights[at][..., : part.shape[-2], : part.shape[-1]] += fade
    return total / weights


def _starts(length: int, side: int, unit: int) -> list[int]:
    """Where tiles begin, in multiples of unit: evenly from one end to the other, each sharing about side / OVERLAP or more
    with the next."""
    if length <= side:
        return [0]
    stride = side - side // OVERLAP
    count = -(-(length - side) // stride) + 1
    return [round(i * (length - side) / (count - 1) / unit) * unit for i in range(count)]


def _fade(length: int) -> Tensor:
    """Weights that rise from each end of a tile over the share that two tiles may have in common."""
    ends = torch.minimum(torch.arange(1, length + 1), torch.arange(length, 0, -1))
    return (ends / max(length // OVERLAP, 1)).clamp(max=1.0).double()
