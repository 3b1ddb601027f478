"""GroupNorm and SiLU in Triton, for channels_last maps on a GPU, for which torch has no kernel: it would copy the map twice.

Three passes. The first takes a part of the pixels and finds, channel by channel, their mean and their sum of squares about it.
The second joins the parts' into those of each group (Chan et al. 1979, "Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances", eq. 2.1), in which nothing cancels. The third normalises. All in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # pixels of a part at the least
PARTS = 64  # parts of one image at the most


@triton.jit
def _moments(x, means, squares, pixels, channels, part, BLOCK: tl.constexpr):
    """A part's mean and sum of squares about it, of every channel: means, squares (b, parts, c)."""
    image, index = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, BLOCK)
    inside = c < channels
    first = index * part
    count = tl.minimum(part, pixels - first)
    rows = x + (image * pixels + first).to(tl.int64) * channels
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(0, count):
        total += tl.load(rows + i * channels + c, mask=inside, other=0.0).to(tl.float32)
    mean = total / count
    square = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(0, count):
        off = tl.load(rows + i * channels + c, mask=inside, other=0.0).to(tl.float32) - mean
        square += off * off
    at = (image * tl.num_programs(1) + index) * channels + c
    tl.store(means + at, mean, mask=inside)
    tl.store(squares + at, square, mask=inside)


@triton.jit
def _join(means, squares, weight, scale, center, pixels, channels, part, width, eps, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """Parts and channels of a group joined: the mean, and what the distance from it is multiplied by, (b, c) each."""
    image, group, parts = tl.program_id(0), tl.program_id(1), tl.cdiv(pixels, part)
    p, j = tl.arange(0, PARTS)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (p < parts) & (j < width)
    c = group * width + j
    at = (image * parts + p) * channels + c
    count = tl.where(inside, tl.minimum(part, pixels - p * part), 0).to(tl.float32)
    mean = tl.load(means + at, mask=inside, other=0.0)
    number = width * pixels
    whole = tl.sum(mean * count) / number
    off = mean - whole
    square = tl.sum(tl.load(squares + at, mask=inside, other=0.0) + count * off * off)
    rstd = 1.0 / tl.sqrt(square / number + eps)
    j = tl.arange(0, WIDTH)
    c, inside = group * width + j, j < width
    factor = rstd * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(scale + image * channels + c, factor, mask=inside)
    tl.store(center + image * channels + c, tl.zeros([WIDTH], dtype=tl.float32) + whole, mask=inside)


@triton.jit
def _apply(x, y, scale, center, bias, pixels, channels, part, BLOCK: tl.constexpr):
    """silu(scale (x - center) + bias)."""
    image, index = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, BLOCK)
    inside = c < channels
    first = index * part
    count = tl.minimum(part, pixels - first)
    start = (image * pixels + first).to(tl.int64) * channels
    factor = tl.load(scale + image * channels + c, mask=inside, other=0.0)
    mean = tl.load(center + image * channels + c, mask=inside, other=0.0)
    offset = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    for i in range(0, count):
        h = tl.load(x + start + i * channels + c, mask=inside, other=0.0).to(tl.float32)
        h = (h - mean) * factor + offset
        tl.store(y + start + i * channels + c, h / (1.0 + tl.exp(-h)), mask=inside)


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """silu(group_norm(x)): (b, c, h, w), channels_last, -> the same."""
    x = x.contiguous(memory_format=torch.channels_last)
    b, c, h, w = x.shape
    pixels = h * w
    part = max(ROWS, triton.cdiv(pixels, PARTS))
    parts = triton.cdiv(pixels, part)
    means, squares = x.new_empty(2, b, parts, c, dtype=torch.float32)
    scale, center = x.new_empty(2, b, c, dtype=torch.float32)
    y = torch.empty_like(x)
    block, width = triton.next_power_of_2(c), c // groups
    _moments[(b, parts)](x, means, squares, pixels, c, part, BLOCK=block)
    sizes = {"PARTS": triton.next_power_of_2(parts), "WIDTH": triton.next_power_of_2(width)}
    _join[(b, groups)](means, squares, weight, scale, center, pixels, c, part, width, eps, **sizes)
    _apply[(b, parts)](x, y, scale, center, bias, pixels, c, part, BLOCK=block)
    return y
