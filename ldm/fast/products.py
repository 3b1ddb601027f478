"""Linear layers and convolutions in bfloat16 by `products_amx.c`: what a CPU with a matrix engine (AMX) does, where there is a
C compiler (`compiling.py`).

oneDNN's, which torch has, take 0.85 to 2 times as long for Stable Diffusion v1's layers: they read their inputs from further
away. Weights are laid out once, (panels of 32 outputs, steps of 32 inputs, taps, 2, 16, 16, 2), in which the last four are
tiles: 16 pairs of inputs by 16 outputs.
"""

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.fast import compiling, native
from ldm.fast.maps import Write, copy
from ldm.fast.memory import let_go
from ldm.fast.plan import Plan

PANEL, STEP, TILE_ROWS, TAPS = 32, 32, 32, 9
THREE = tuple((dy, dx) for dy in range(3) for dx in range(3))  # a 3x3 kernel's taps, from the pixel above and to the left
# Of upsampled pixels, the even ones see their own source and the one before, the odd ones that after: the taps of one axis that
# fall on each.
EVEN, ODD = ((0, (0,)), (1, (1, 2))), ((1, (0, 1)), (2, (2,)))


def multiplies(inputs: int, plan: Plan) -> bool:
    """Whether that kernel takes a layer of so many input features, as planned."""
    return plan.kernels and inputs % STEP == 0 and native.engages(plan.dtype)


def pack(weights: Sequence[Tensor], *, gated: bool = False) -> Tensor:
    """weights (outputs, inputs, taps), float32 or bfloat16, one after the other, as the kernel reads them. gated: each panel
    has 16 values and then their 16 gates, of which the weight, one, has all values first."""
    (_, inputs, taps), outputs = weights[0].shape, sum(len(weight) for weight in weights)
    panels = -(-outputs // PANEL)
    shape = (panels, inputs // STEP, taps, 2, 16, 16, 2)
    made = torch.empty(shape, dtype=torch.bfloat16)
    if len(weights) > 1 and any(len(weight) % PANEL for weight in weights):
        weights = [torch.cat([weight.detach() for weight in weights])]
    first, done = made.data_ptr(), 0
    for weight in weights:
        weight = weight.detach() if weight.dtype in native.TYPES else weight.detach().float()
        weight = weight.contiguous()
        call = (ctypes.c_int64 * 6)(weight.data_ptr(), first + 2 * done * inputs * taps, *weight.shape, gated)
        getattr(compiling.library("products_amx"), f"pack_{native.TYPES[weight.dtype]}")(call)
        let_go(weight)
        done += len(weight)
    return made


def gated_bias(bias: Tensor) -> Tensor:
    """bias (outputs,), all values' first, in the order of a gated weight."""
    return bias.view(2, -1, 16).transpose(0, 1).flatten()


def linear(x: Tensor, weight: Tensor, bias: Tensor, outputs: int, addend: Tensor | None = None, gated: bool = False) -> Tensor:
    """x (..., inputs) -> (..., outputs), plus the addend; gated: values times GELU of gates, (..., outputs / 2)."""
    x = x if x.stride(-1) == 1 and x.flatten(0, -2).data_ptr() == x.data_ptr() else x.contiguous()
    rows = x.flatten(0, -2)
    out = x.new_empty(*x.shape[:-1], outputs // 2 if gated else outputs)
    count = len(rows)
    if count:
        shape = (count, count, 1, 1), (0, 0, out.shape[-1])
        _multiply(rows, count, count, weight, bias, addend, out, outputs, ((0, 0),), *shape, gated=gated)
    return out


def bordered(x: Tensor, write: Write = copy) -> Tensor:
    """A map (b, c, h, w), through `write`, as a convolution reads it: rows of c features, those of every line of pixels after
    one of zeros, and of every map after a line of zeros; and some more, that are read for nothing."""
    b, c, h, w = x.shape
    lines = b * (h + 1) + 1
    made = x.new_empty((lines + 2) * (w + 1) + 2 * TILE_ROWS, c)
    cells = made[: lines * (w + 1)].view(lines, w + 1, c)
    cells[0].zero_()
    cells[:, 0].zero_()
    made[lines * (w + 1)].zero_()
    maps = cells[1:].view(b, h + 1, w + 1, c)
    maps[:, h].zero_()
    write(x.permute(0, 2, 3, 1), maps[:, :h, 1:])
    return made


def convolve(
    rows: Tensor,
    size: tuple[int, int, int],
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    taps=THREE,
    addend: Tensor | None = None,
) -> None:
    """The convolution of rows, a `bordered` map of size (b, h, w), -> out (b, h, w, outputs), any part of a map whose outputs
    are neighbours. taps: down and to the right from the pixel above and to the left."""
    b, h, w = size
    shape = (w + 1, w, h + 1, h), out.stride()[:3]
    _multiply(rows, b * (h + 1) * (w + 1), len(rows), weight, bias, addend, out, out.shape[3], taps, *shape)


def _multiply(rows, count, readable, weight, bias, addend, out, outputs, taps, shape, strides, *, gated: bool = False) -> None:
    across, inputs = shape[0], rows.shape[1]
    bias = F.pad(bias.float(), (0, -outputs % PANEL))
    if addend is not None and addend.stride() != out.stride():
        addend = torch.empty_like(out).copy_(addend)
    tensors = (rows, weight, bias, addend, out)
    offsets = [dy * across + dx for dy, dx in taps] + [0] * (TAPS - len(taps))
    sizes = (count, readable, rows.stride(0), inputs, outputs, len(taps), *offsets)
    pointers = (0 if one is None else one.data_ptr() for one in tensors)
    call = (ctypes.c_int64 * 32)(*pointers, *sizes, *shape, *strides, gated, torch.get_num_threads())
    if compiling.library("products_amx").products(call):
        raise MemoryError(f"no memory for products of {inputs} features")


class TiledConvolution(nn.Module):
    """The 3x3 convolution of `conv`, stride 1, padding 1."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype):
        super().__init__()
        self.weight, self.bias = pack([conv.weight.flatten(2)]), conv.bias.detach().to(dtype)

    def forward(self, x: Tensor, bias: Tensor | None = None, write: Write = copy, addend: Tensor | None = None) -> Tensor:
        """x (b, c, h, w) -> (b, o, h, w). bias: (o,) in place of the layer's own. write: what is done with x beforehand.
        addend: as the result, which it is added to."""
        bias, (b, _, h, w) = self.bias if bias is None else bias, x.shape
        out = x.new_empty(b, h, w, len(bias))
        addend = None if addend is None else addend.permute(0, 2, 3, 1)
        convolve(bordered(x, write), (b, h, w), self.weight, bias, out, addend=addend)
        return out.permute(0, 3, 1, 2)


class TiledUpsampling(nn.Module):
    """Nearest upsampling to twice the size, then the 3x3 convolution `conv`: four convolutions of the smaller map, each of a
    quarter of the pixels, with the taps that fall on one pixel summed beforehand."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype):
        super().__init__()
        self.bias, self.parts = conv.bias.detach().to(dtype), []
        taps = conv.weight.detach().float().flatten(2)  # (o, c, 9)
        for y, rows in enumerate((EVEN, ODD)):
            for x, columns in enumerate((EVEN, ODD)):
                pairs = [(row, column) for row in rows for column in columns]
                falls = torch.zeros(9, len(pairs))
                for i, ((_, dys), (_, dxs)) in enumerate(pairs):
                    falls[[3 * dy + dx for dy in dys for dx in dxs], i] = 1
                places = tuple((dy, dx) for (dy, _), (dx, _) in pairs)
                self.parts.append((y, x, places, pack([taps @ falls])))

    def forward(self, x: Tensor) -> Tensor:
        """x (b, c, h, w) -> (b, o, 2 h, 2 w)."""
        b, _, h, w = x.shape
        out, rows = x.new_empty(b, 2 * h, 2 * w, len(self.bias)), bordered(x)
        for top, left, places, weight in self.parts:
            convolve(rows, (b, h, w), weight, self.bias, out[:, top::2, left::2], places)
        return out.permute(0, 3, 1, 2)
