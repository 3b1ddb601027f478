"""Convolutions with their weights laid out once: direct, through Winograd's transform, and onto a map twice the size.

Each is made from a layer of the reference, which stays as it is. Maps are (b, c, h, w), channels_last.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.fast import native, packing, products
from ldm.fast.maps import padded
from ldm.fast.memory import converted, let_go
from ldm.fast.normalisation import GroupNorm
from ldm.fast.plan import Plan
from ldm.fast.products import TiledConvolution, TiledUpsampling
from ldm.fast.winograd import Winograd

WIDE = (torch.float32, torch.float64)
# Where Winograd's transforms cost less than what they save. In C: of so many pixels.
WINOGRAD_IN_C = 256
HALF_OUTPUTS = 128  # in bfloat16, whose products a direct one has at twice the rate: to so many channels
# In torch: not with fewer channels, of fewer pixels, or of less work.
WINOGRAD_CHANNELS = 256
WINOGRAD_PIXELS = 512
WINOGRAD_FLOPS = 4e9
# Its kernels are four times the layer's there, and what they save for each of their bytes grows with the pixels: of at least so
# many they can be made anew at every call; to have them of any number they must be kept, for as much again as the weights.
WINOGRAD_LARGE = 8192
BANDED = 16 << 20  # elements of the smallest map that is normalised by bands
BAND = 4 << 20  # elements of a band


def convolution(conv: nn.Conv2d, plan: Plan, pixels: int) -> nn.Module:
    """The quickest way to compute `conv`, a 3x3 convolution, on the device where it is.

    pixels: about how many it will be of at a time, those of all samples together.
    plan.winograd: "auto" where it is quicker and takes no more memory, "all" where it is quicker, or "none". What is returned
    is called with (x, bias): a bias (o,) in place of the layer's own, or None for that.
    """
    if tiled(conv, plan):
        return TiledConvolution(conv, plan.dtype)
    if plan.winograd == "none" or conv.weight.device.type != "cpu" or conv.stride != (1, 1) or conv.padding != (1, 1):
        return Direct(conv, plan.dtype)
    if plan.kernels and native.convolves(conv, plan.dtype):
        quick = plan.dtype == torch.float32 or conv.out_channels >= HALF_OUTPUTS
        pays = pixels >= WINOGRAD_IN_C and quick
    elif plan.dtype not in WIDE:
        pays = False
    else:
        enough = pixels >= max(WINOGRAD_PIXELS, WINOGRAD_LARGE if plan.winograd == "auto" else 0)
        work, narrowest = 18 * conv.in_channels * conv.out_channels * pixels, min(conv.in_channels, conv.out_channels)
        pays = enough and work >= WINOGRAD_FLOPS and narrowest >= WINOGRAD_CHANNELS
    return Winograd(conv, plan) if pays else Direct(conv, plan.dtype)


def tiled(conv: nn.Conv2d, plan: Plan) -> bool:
    """Whether a matrix engine computes `conv`."""
    plain = conv.kernel_size == (3, 3) and conv.stride == conv.padding == (1, 1) and conv.weight.device.type == "cpu"
    return plain and products.multiplies(conv.in_channels, plan)


class Direct(nn.Module):
    """The convolution as it is. On a CPU its weight is packed into blocks for oneDNN when it is first used."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, *, pack: bool = True):
        super().__init__()
        self.pack, self.packed = pack and packing.possible(conv.weight, dtype), False
        self.weight = converted(conv.weight, dtype)
        if not self.pack:
            self.weight = self.weight.contiguous(memory_format=torch.channels_last)
        self.bias = conv.bias.detach().to(dtype)
        self.stride, self.padding = conv.stride, conv.padding

    def forward(self, x: Tensor, bias: Tensor | None = None, padding: tuple[int, int] | None = None) -> Tensor:
        """bias, padding: in place of the layer's own."""
        bias = self.bias if bias is None else bias
        if self.pack and not self.packed:
            self.weight = packing.convolution(self.weight, x.shape, self.stride, self.padding)
            self.packed = True
        convolve = packing.convolve if self.packed else F.conv2d
        return convolve(x, self.weight, bias, self.stride, self.padding if padding is None else padding)


class Normalised(nn.Module):
    """SiLU(GroupNorm(x)), and then a 3x3 convolution, stride 1, padding 1.

    Before Winograd's transform, and where a map is large, the norm is applied by bands of rows as the convolution comes to
    them: a decoder's largest maps take more memory than all its weights, and need not be there twice.
    """

    def __init__(self, norm: nn.GroupNorm, conv: nn.Conv2d, plan: Plan, pixels: int):
        super().__init__()
        self.norm, self.conv = GroupNorm(norm, plan), convolution(conv, plan, pixels)

    @property
    def bias(self) -> Tensor:
        return self.conv.bias

    def forward(self, x: Tensor, bias: Tensor | None = None, addend: Tensor | None = None) -> Tensor:
        """x (b, c, h, w) -> (b, o, h, w). bias: (o,) in place of the layer's own. addend: as the result, which it is added
        to."""
        if isinstance(self.conv, TiledConvolution):
            return self.conv(x, bias, self.norm.writing(x), addend)
        y = self._convolved(x, bias)
        return y if addend is None else y.add_(addend)

    def _convolved(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.conv, Winograd) and self.norm.by_parts:
            return self.conv(x, bias, self.norm.writing(x))
        if x.device.type == "cpu" and self.norm.by_parts and x.numel() >= BANDED:
            return self._banded(x, bias)
        return self.conv(self.norm(x), bias)

    def _banded(self, x: Tensor, bias: Tensor | None) -> Tensor:
        b, c, h, w = x.shape
        pixels, write, rows = x.permute(0, 2, 3, 1), self.norm.writing(x), max(1, BAND // (b * w * c))
        y = x.new_empty(b, h, w, self.bias.shape[0])
        for top in range(0, h, rows):
            count = min(rows, h - top)
            band = padded(pixels, top - 1, count + 2, 0, w, write).permute(0, 3, 1, 2)
            y[:, top : top + count] = self.conv(band, bias, padding=(0, 1)).permute(0, 2, 3, 1)
        return y.permute(0, 3, 1, 2)


class Upsampling(nn.Module):
    """Nearest upsampling to twice the size, then the 3x3 convolution `conv`. Exact but for rounding.

    Of the nine pixels under the kernel, only four differ; with the taps on equal pixels summed beforehand, four multiplications
    of nine remain: a matrix engine makes each quarter of the pixels for itself (`products.py`), elsewhere all are one
    transposed convolution, 4x4, stride 2. Winograd's transform in C reads each pixel as four instead, and leaves a quarter, but
    in float32, whose products take twice as long as bfloat16's.
    """

    # Which of the three taps of one axis each of the four is the sum of.
    TAPS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))

    def __init__(self, conv: nn.Conv2d, plan: Plan, pixels: int):
        """pixels: of the upsampled maps."""
        super().__init__()
        self.bias, self.packed = conv.bias.detach().to(plan.dtype), False
        self.reference = (conv.weight,)  # for odd sizes; in a tuple, so that it is no part of this module
        self.tiled = TiledUpsampling(conv, plan.dtype) if tiled(conv, plan) else None
        halves = plan.dtype not in WIDE and packing.possible(conv.weight, plan.dtype)
        quick = None if self.tiled or halves else convolution(conv, plan, pixels)
        self.winograd = quick if isinstance(quick, Winograd) and quick.native else None
        self.weight = None if self.tiled or self.winograd else self._summed(conv.weight, plan.dtype)
        let_go(conv.weight)

    def _summed(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """(o, c, 3, 3) -> (c, o, 4, 4), channels_last."""
        taps = torch.tensor(self.TAPS, dtype=torch.float64, device=weight.device)
        both_axes = torch.einsum("ak, bl -> abkl", taps, taps).reshape(16, 9)
        kernels = weight.detach().permute(1, 0, 2, 3).flatten(2)  # (in, out, 9)
        made = kernels.new_empty(*kernels.shape[:2], 4, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for some, out in zip(kernels, made, strict=True):  # an input channel at a time, since float64 takes room
            out.copy_((some.double() @ both_axes.T).view_as(out))
        return made

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """size: (h', w') of the output, 2h or 2h - 1 and the same in width; 2h and 2w where left out."""
        h, w = x.shape[-2:]
        if size is not None and tuple(size) != (2 * h, 2 * w):
            (weight,) = self.reference  # at an odd edge the last pixel has a neighbour less
            larger = F.interpolate(x, size=size, mode="nearest")
            return F.conv2d(larger, weight.detach().to(self.bias.dtype), self.bias, padding=1)
        if self.tiled is not None:
            return self.tiled(x)
        if self.winograd is not None:
            return self.winograd(x, scale=2)
        if not self.packed and packing.possible(self.weight, self.bias.dtype):
            self.weight, self.packed = packing.transposed(self.weight, x.shape), True
        if self.packed:
            return packing.convolve_transposed(x, self.weight, self.bias)
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)
