"""Norms: of groups, with the SiLU that comes before every convolution and nothing kept between the two, and of layers.

Wu & He 2018, "Group Normalization", arXiv:1803.08494. Ba et al. 2016, "Layer Normalization", arXiv:1607.06450.
"""

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.fast import native
from ldm.fast.maps import Write
from ldm.fast.plan import Plan

WIDE = (torch.float32, torch.float64)
BAND = 1 << 19  # elements whose squares are summed at a time: what stays in a core's cache


@functools.cache
def in_triton(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """`kernels.group_norm_silu` where Triton is installed and can compile for the device, which is tried: it needs a C compiler
    and Python's headers too."""
    try:
        from ldm.fast.kernels import group_norm_silu

        x, (weight, bias) = torch.ones(1, 2, 4, 4, dtype=dtype, device=device), torch.ones(2, 2, dtype=dtype, device=device)
        group_norm_silu(x, 1, weight, bias, 1e-5)
    except ModuleNotFoundError:
        return None
    except Exception as error:  # the compiler's, the driver's, Triton's own: they have no class in common
        reason = " ".join(str(error).split())[:160]
        warnings.warn(f"Triton cannot compile for {device} ({reason}); GroupNorm is torch's, which is slower", stacklevel=2)
        return None
    return group_norm_silu


class GroupNorm(nn.Module):
    """silu(group_norm(x)), or without SiLU: (b, c, h, w) -> (b, c, h, w), channels_last. With it on a GPU in Triton, where that
    works; on a CPU in C, where there is a compiler."""

    def __init__(self, norm: nn.GroupNorm, plan: Plan, *, silu: bool = True):
        super().__init__()
        self.groups, self.eps, self.silu = norm.num_groups, norm.eps, silu
        self.weight, self.bias = (tensor.detach().to(plan.dtype) for tensor in (norm.weight, norm.bias))
        on_gpu = self.weight.is_cuda and plan.dtype != torch.float64
        self.kernel = in_triton(self.weight.device, plan.dtype) if silu and plan.kernels and on_gpu else None
        self.native = False
        if plan.kernels and self.weight.device.type == "cpu" and native.normalises(norm.num_channels, plan.dtype):
            self.native, self.wide = True, (norm.weight.detach().float(), norm.bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is not None:
            return self.kernel(x, self.groups, self.weight, self.bias, self.eps)
        if self.native:
            out = torch.empty_like(x, memory_format=torch.channels_last)
            self.writing(x)(x.permute(0, 2, 3, 1), out.permute(0, 2, 3, 1))
            return out
        y = F.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        return F.silu(y, inplace=True) if self.silu else y

    @property
    def by_parts(self) -> bool:
        """Whether moments are found precisely enough for the norm to be applied to one part after the other."""
        return self.native or self.weight.dtype in WIDE

    def writing(self, x: Tensor) -> Write:
        """The same of any part of x (b, c, h, w), where `by_parts`: all of it at once would take room, and another copy."""
        if self.native:
            found = native.moments(x.permute(0, 2, 3, 1).contiguous(), self.groups, *self.wide, self.eps)
            return lambda part, out: native.normalise(part, found, out, self.silu)
        b, c, h, w = x.shape
        pixels, rows = x.permute(0, 2, 3, 1), max(1, BAND // (b * c * w))
        total = torch.zeros(2, b, c, dtype=torch.float64, device=x.device)  # of values and of squares
        squares = x.new_empty(b, min(rows, h), w, c)
        for band in pixels.split(rows, dim=1):
            total[0] += band.sum((1, 2))
            total[1] += torch.mul(band, band, out=squares[:, : band.shape[1]]).sum((1, 2))
        mean, square = (total.view(2, b, self.groups, -1).sum(-1, keepdim=True) * (self.groups / (c * h * w))).unbind()
        deviation = (square - mean.square()).clamp(min=0).add(self.eps).sqrt()
        scale = (self.weight.view(self.groups, -1) / deviation).flatten(1)
        offset = self.bias - mean.expand(-1, -1, c // self.groups).flatten(1) * scale
        scale, offset = scale.to(x.dtype), offset.to(x.dtype)

        def write(band: Tensor, out: Tensor) -> None:
            for i in range(b):
                torch.addcmul(offset[i], band[i], scale[i], out=out[i])
            if self.silu:
                F.silu(out, inplace=True)

        return write


class LayerNorm(nn.Module):
    """layer_norm(x): (..., c) -> (..., c). On a CPU in C, where there is a compiler."""

    def __init__(self, norm: nn.LayerNorm, plan: Plan):
        super().__init__()
        self.eps, (channels,) = norm.eps, norm.normalized_shape
        self.native = plan.kernels and norm.weight.device.type == "cpu" and native.normalises(channels, plan.dtype)
        dtype = torch.float32 if self.native else plan.dtype
        self.weight, self.bias = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.native:
            return native.layer_norm(x, self.weight, self.bias, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
