"""GroupNorm and SiLU in Triton, for channels_last maps on a GPU, for which torch has no kernel: it would copy the map twice.

Three passes. The first takes a part of the pixels and finds, channel by channel, their mean and their sum of squares about it
(Welford 1962, "Note on a Method for Calculating Corrected Sums of Squares and Products"). The second joins the parts' into
those of each group (Chan et al. 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", eq. 2.1), in
which nothing cancels. The third normalises. All in float32. The first and the third read several rows at a time, pixels with
all their channels: one row would leave most of the memory's width unused.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements that a program has at a time: its rows are as many as that makes
LEAST_ROWS, MOST_ROWS = 2, 64
LEAST_PART = 8  # rows of a part: of fewer, its moments would be nearly as much memory as the part
PROGRAMS = 1024  # in all: several for each of a large GPU's multiprocessors, of which an H200 has 132
WARPS = 8


@triton.jit
def _moments(x, means, squares, pixels, channels, part, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A part's mean and sum of squares about it, of every channel: means, squares (b, parts, c).

    Each of ROWS lanes goes through every ROWS-th row of the part; then they are joined as parts are.
    """
    image, index = tl.program_id(0), tl.program_id(1)
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    first = index * part
    count = tl.minimum(part, pixels - first)
    rows = x + (image * pixels + first).to(tl.int64) * channels
    mean = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    square = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(0, count, ROWS):
        inside = (start + r < count) & (c < channels)
        h = tl.load(rows + (start + r) * channels + c, mask=inside, other=0.0).to(tl.float32)
        off = tl.where(inside, h - mean, 0.0)
        mean += off / (start // ROWS + 1)
        square += off * (h - mean)
    number = ((count - r + ROWS - 1) // ROWS).to(tl.float32)  # of each lane's rows
    whole = tl.sum(mean * number, axis=0)[None, :] / count
    off = mean - whole
    square = tl.sum(square + number * off * off, axis=0)[None, :]
    at = (image * tl.num_programs(1) + index) * channels + c
    tl.store(means + at, whole, mask=c < channels)
    tl.store(squares + at, square, mask=c < channels)


@triton.jit
def _join(means, squares, weight, scale, center, pixels, channels, part, width, eps, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """Parts and channels of a group joined: the mean, and what the distance from it is multiplied by, (b, c) each."""
    image, group, parts = tl.program_id(0), tl.program_id(1), tl.cdiv(pixels, part)
    p, j = tl.arange(0, PARTS)[:, None], tl.arange(0, WIDTH)[None, :]
    at = (image * parts + p) * channels + group * width + j
    total = tl.zeros([PARTS, WIDTH], dtype=tl.float32)
    for start in range(0, parts, PARTS):
        inside = (start + p < parts) & (j < width)
        count = tl.minimum(part, pixels - (start + p) * part).to(tl.float32)
        total += count * tl.load(means + at + start * channels, mask=inside, other=0.0)
    number = width * pixels
    whole = tl.sum(total) / number
    total = tl.zeros([PARTS, WIDTH], dtype=tl.float32)
    for start in range(0, parts, PARTS):
        inside = (start + p < parts) & (j < width)
        count = tl.minimum(part, pixels - (start + p) * part).to(tl.float32)
        off = tl.load(means + at + start * channels, mask=inside, other=0.0) - whole
        square = tl.load(squares + at + start * channels, mask=inside, other=0.0)
        total += tl.where(inside, square + count * off * off, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(total) / number + eps)
    j = tl.arange(0, WIDTH)
    c, inside = group * width + j, j < width
    factor = rstd * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(scale + image * channels + c, factor, mask=inside)
    tl.store(center + image * channels + c, tl.zeros([WIDTH], dtype=tl.float32) + whole, mask=inside)


@triton.jit
def _apply(x, y, scale, center, bias, pixels, channels, part, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """silu(scale (x - center) + bias)."""
    image, index = tl.program_id(0), tl.program_id(1)
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    first = index * part
    count = tl.minimum(part, pixels - first)
    before = (image * pixels + first).to(tl.int64) * channels
    factor = tl.load(scale + image * channels + c, mask=c < channels, other=0.0)
    mean = tl.load(center + image * channels + c, mask=c < channels, other=0.0)
    offset = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    for start in range(0, count, ROWS):
        inside = (start + r < count) & (c < channels)
        at = before + (start + r) * channels + c
        h = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        h = (h - mean) * factor + offset
        tl.store(y + at, h / (1.0 + tl.exp(-h)), mask=inside)


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """silu(group_norm(x)): (b, c, h, w), channels_last, -> the same."""
    x = x.contiguous(memory_format=torch.channels_last)
    b, c, h, w = x.shape
    pixels, block, width = h * w, triton.next_power_of_2(c), c // groups
    rows = min(MOST_ROWS, max(LEAST_ROWS, TILE // block))
    part = rows * triton.cdiv(max(LEAST_PART, triton.cdiv(b * pixels, PROGRAMS)), rows)
    parts = triton.cdiv(pixels, part)
    means, squares = x.new_empty(2, b, parts, c, dtype=torch.float32)
    scale, center = x.new_empty(2, b, c, dtype=torch.float32)
    y = torch.empty_like(x)
    tile = {"ROWS": rows, "BLOCK": block, "num_warps": WARPS}
    wide = triton.next_power_of_2(width)
    joined = {"PARTS": min(triton.next_power_of_2(parts), max(1, TILE // wide)), "WIDTH": wide, "num_warps": WARPS}
    with torch.cuda.device_of(x):  # on which Triton launches
        _moments[(b, parts)](x, means, squares, pixels, c, part, **tile)
        _join[(b, groups)](means, squares, weight, scale, center, pixels, c, part, width, eps, **joined)
        _apply[(b, parts)](x, y, scale, center, bias, pixels, c, part, **tile)
    return y
