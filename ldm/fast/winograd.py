"""A 3x3 convolution in a quarter of the multiplications: Winograd's F(4x4, 3x3), exact but for rounding.

Lavin & Gray 2015, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308, section 4.1: for a 6x6 tile d of the
padded input and a kernel g, the 4x4 outputs are A^T [(G g G^T) * (B^T d B)] A (eq. 8), with a product of matrices over the
channels for each of the 36 elements. The transforms are those of Cook and Toom: polynomials evaluated at the points below and
at infinity. With Lavin's own points (0, +-1, +-2) the error is 2.7 times a direct convolution's at 320 channels; with 2/3 and
3/2, whose powers stay near 1 (Barabasz et al. 2020, "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep
Neural Networks", arXiv:1803.10986), it is 1.05 to 1.2 times that at 320 channels and 0.7 to 1.0 times at 1280, by processor,
since the sums over the channels are a ninth as long.

It pays on a CPU, where multiplications are what a convolution waits for, in float32, and in bfloat16 where no matrix engine
computes that (in C alone). Maps are (b, c, h, w), channels_last.
"""

import math

import torch
from torch import Tensor, nn

from ldm.fast import native
from ldm.fast.maps import Write, copy, padded
from ldm.fast.memory import let_go
from ldm.fast.plan import Plan

OUT, TILE = 4, 6  # the side of a tile of outputs, and of the inputs they are of
SMALL, LARGE = 2 / 3, 3 / 2  # the points are 0, +-SMALL, +-LARGE and infinity
BLOCK = 4 << 20  # elements of transformed input at a time: what stays in the last level of cache between two passes
BLOCK_IN_C = 3 << 20  # the same for `winograd.c`: 12 MB; four times as much no longer stays there, which costs up to a third
CHANNELS = 64  # of a partial sum, in torch
PART = 1 << 14  # pairs of channels whose kernels are transformed at a time


def kernel_transform() -> Tensor:
    """G (6, 3), float64: a kernel's values at the points, over the product of each point's distances from the others."""
    points = [0.0, SMALL, -SMALL, LARGE, -LARGE]
    rows = []
    for a in points:
        distance = math.prod(a - b for b in points if b != a)
        rows.append([1 / distance, a / distance, a * a / distance])
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)


def transform_kernel(taps: Tensor) -> Tensor:
    """G g G^T of every pair of channels: (9, c, o) -> (36, c, o), computed in float64 and rounded once."""
    g = kernel_transform().to(taps.device)
    both_axes = torch.einsum("ik, jl -> ijkl", g, g).reshape(TILE * TILE, 9)
    kernels = taps.flatten(1)
    made = taps.new_empty(TILE * TILE, kernels.shape[1])
    for some, out in zip(kernels.split(PART, dim=1), made.split(PART, dim=1), strict=True):
        out.copy_(both_axes @ some.double())
    return made.view(TILE * TILE, *taps.shape[1:])


def transform_inputs(d: list[Tensor], out: Tensor, even: Tensor, odd: Tensor) -> None:
    """B^T d along one axis: six tensors -> out (6, ...). even, odd: scratch of one such tensor's shape.

    Up to scale, row j is the polynomial whose zeros are the other points: x^4 - (SMALL^2 + LARGE^2) x^2 + 1 for the point 0.
    """
    both = SMALL**2 + LARGE**2
    torch.add(d[0], d[4], out=out[0]).add_(d[2], alpha=-both)
    torch.add(d[1], d[5], out=out[5]).add_(d[3], alpha=-both)
    for row, point, other in ((1, SMALL, LARGE), (3, LARGE, SMALL)):
        torch.add(d[4], d[2], alpha=-(other**2), out=even)
        torch.add(d[3], d[1], alpha=-(other**2), out=odd)
        torch.add(even, odd, alpha=point, out=out[row])
        torch.add(even, odd, alpha=-point, out=out[row + 1])


def transform_outputs(m: Tensor, out: list[Tensor]) -> None:
    """A^T m along one axis: m (6, ...), which is overwritten, -> four tensors, the polynomials' values' coefficients."""
    plus, minus, plus_large, minus_large = m[1] + m[2], m[1].sub_(m[2]), m[3] + m[4], m[3].sub_(m[4])
    torch.add(m[0], plus, out=out[0]).add_(plus_large)
    torch.mul(minus, SMALL, out=out[1]).add_(minus_large, alpha=LARGE)
    torch.mul(plus, SMALL**2, out=out[2]).add_(plus_large, alpha=LARGE**2)
    torch.add(m[5], minus, alpha=SMALL**3, out=out[3]).add_(minus_large, alpha=LARGE**3)


def multiply(inputs: Tensor, kernel: Tensor) -> Tensor:
    """inputs (36, tiles, c), kernel (36, c, o) -> (36, tiles, o), summed by parts of the channels: where a library sums one
    after the other, the error grows with the number of a part, rather than of all."""
    sums = None
    for some, part in zip(inputs.split(CHANNELS, dim=2), kernel.split(CHANNELS, dim=1), strict=True):
        sums = torch.bmm(some, part) if sums is None else sums.baddbmm_(some, part)
    return sums


class Winograd(nn.Module):
    """The 3x3 convolution of `conv`, stride 1, padding 1: in C (`winograd.c`) where that can be, else in torch.

    In torch its kernel is four times the layer's own. It is made anew at every call, which of large maps takes a hundredth of
    the time; where plan.winograd is "all", it is kept.
    """

    def __init__(self, conv: nn.Conv2d, plan: Plan):
        super().__init__()
        self.native = plan.kernels and native.convolves(conv, plan.dtype)
        taps = conv.weight.detach().to(plan.dtype).permute(2, 3, 1, 0).flatten(0, 1)  # (9, c, o)
        self.taps = native.kernels(taps) if self.native else taps.contiguous()
        self.kernel = None
        if plan.winograd == "all" and not self.native:
            self.kernel, self.taps = transform_kernel(self.taps), None
        self.bias = conv.bias.detach().to(plan.dtype)
        let_go(conv.weight)

    def forward(self, x: Tensor, bias: Tensor | None = None, write: Write = copy, scale: int = 1) -> Tensor:
        """x (b, c, h, w) -> (b, o, scale h, scale w).

        bias: (o,) in place of the layer's own. write: what is done with x beforehand. scale: 2, in C alone, for nearest
        upsampling beforehand.
        """
        b, c, h, w = x.shape
        bias = self.bias if bias is None else bias
        tall, wide = -(-scale * h // OUT), -(-scale * w // OUT)  # tiles
        y = x.new_empty(b, tall * OUT, wide * OUT, len(bias))
        kernel = self.kernel if self.native or self.kernel is not None else transform_kernel(self.taps)
        rows = max(1, min(tall, (BLOCK_IN_C if self.native else BLOCK) // (TILE * TILE * b * wide * c)))
        pixels, step = x.permute(0, 2, 3, 1), OUT // scale
        for top in range(0, tall, rows):
            count = min(rows, tall - top)
            band = padded(pixels, step * top - 1, step * count + 2, -1, step * wide + 2, write)
            part = y[:, OUT * top : OUT * (top + count)]
            if self.native:
                native.winograd(band, self.taps, bias, part, scale)
            else:
                self._block(band, kernel, part)
                part += bias
        return y[:, : scale * h, : scale * w].permute(0, 3, 1, 2)

    def _block(self, d: Tensor, kernel: Tensor, y: Tensor) -> None:
        """d (b, 4 rows + 2, 4 columns + 2, c), kernel (36, c, o) -> y (b, 4 rows, 4 columns, o)."""
        b, c, o = d.shape[0], d.shape[3], y.shape[3]
        rows, columns = y.shape[1] // OUT, y.shape[2] // OUT
        half = d.new_empty(TILE, b, rows, d.shape[2], c)
        scratch = d.new_empty(2, b, rows, d.shape[2], c)
        transform_inputs([d[:, i : i + OUT * (rows - 1) + 1 : OUT] for i in range(TILE)], half, *scratch)
        whole = d.new_empty(TILE, TILE, b, rows, columns, c)
        scratch = d.new_empty(2, TILE, b, rows, columns, c)
        taps = [half[:, :, :, j : j + OUT * (columns - 1) + 1 : OUT] for j in range(TILE)]
        transform_inputs(taps, whole.transpose(0, 1), *scratch)
        products = multiply(whole.view(TILE * TILE, -1, c), kernel).view(TILE, TILE, b, rows, columns, o)
        half = d.new_empty(OUT, TILE, b, rows, columns, o)
        transform_outputs(products, list(half))
        tiles = y.view(b, rows, OUT, columns, OUT, o)
        transform_outputs(half.transpose(0, 1), [tiles[:, :, :, :, j].movedim(2, 0) for j in range(OUT)])
