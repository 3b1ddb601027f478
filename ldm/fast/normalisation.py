"""Group normalisation and SiLU, the two operations before every convolution, with nothing kept between them.

Wu & He 2018, "Group Normalization", arXiv:1803.08494.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.fast.plan import Plan


class GroupNormSiLU(nn.Module):
    """silu(group_norm(x)): (b, c, h, w) -> (b, c, h, w), channels_last. On a GPU in Triton, where that is installed."""

    def __init__(self, norm: nn.GroupNorm, plan: Plan):
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = (tensor.detach().to(plan.dtype) for tensor in (norm.weight, norm.bias))
        self.kernel = None
        if plan.kernels and self.weight.is_cuda and plan.dtype != torch.float64 and importlib.util.find_spec("triton"):
            from ldm.fast.kernels import group_norm_silu

            self.kernel = group_norm_silu

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is not None:
            return self.kernel(x, self.groups, self.weight, self.bias, self.eps)
        return F.silu(F.group_norm(x, self.groups, self.weight, self.bias, self.eps), inplace=True)
