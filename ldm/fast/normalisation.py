"""Group normalisation and SiLU, the two operations before every convolution, with nothing kept between them.

Wu & He 2018, "Group Normalization", arXiv:1803.08494.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class GroupNormSiLU(nn.Module):
    """silu(group_norm(x)): (b, c, h, w) -> (b, c, h, w), channels_last."""

    def __init__(self, norm: nn.GroupNorm, dtype):
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = (tensor.detach().to(dtype) for tensor in (norm.weight, norm.bias))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, self.groups, self.weight, self.bias, self.eps), inplace=True)
