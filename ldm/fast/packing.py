"""Weights in the blocks that oneDNN computes with, laid out once instead of at every call: what torch's compiler does."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.fast.memory import let_go

LEAST_ROWS = 16  # of fewer, a product waits for its weight, whatever the layout


def possible(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether this torch can do it for such a weight in dtype."""
    ops = torch.ops.mkldnn
    kinds = ("convolution", "convolution_transpose", "linear")
    known = all(hasattr(ops, f"_reorder_{kind}_weight") for kind in kinds)
    if not known or weight.device.type != "cpu" or not torch.backends.mkldnn.enabled:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())


def linear(weight: Tensor, rows: int) -> Tensor:
    """weight (out, in) for `mkldnn._linear_pointwise`. rows: how many it will be multiplied with; others are as right."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    let_go(weight)
    return packed


def convolution(weight: Tensor, shape: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """weight (out, in, k, k) for `convolve`. shape: of the input to come; others are as right."""
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, (1, 1), 1, list(shape))
    let_go(weight)
    return packed


def convolve(x: Tensor, weight: Tensor, bias: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """`F.conv2d` with a packed weight: x (b, c, h, w), channels_last, likewise out."""
    return torch.ops.mkldnn._convolution_pointwise.default(x, weight, bias, padding, stride, (1, 1), 1, "none", [], "")


def transposed(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """weight (in, out, 4, 4) for `convolve_transposed`. shape: of the input to come; others are as right."""
    return torch.ops.mkldnn._reorder_convolution_transpose_weight(weight, (1, 1), (0, 0), (2, 2), (1, 1), 1, list(shape))


def convolve_transposed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.conv_transpose2d` with stride 2, padding 1 and a packed weight: x (b, c, h, w), channels_last, likewise out."""
    pointwise = torch.ops.mkldnn._convolution_transpose_pointwise.default
    return pointwise(x, weight, bias, (1, 1), (0, 0), (2, 2), (1, 1), 1, "none", [], "")
