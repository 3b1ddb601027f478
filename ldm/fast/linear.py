"""Linear layers with their weights laid out once, several of one input as one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.fast import packing
from ldm.fast.memory import converted, let_go


class Linear(nn.Module):
    """Linear layers of one input as one: (..., in) -> (..., the sum of their outputs).

    On a CPU the weight is packed into blocks for oneDNN when it is first used.
    """

    def __init__(self, *layers: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.weight: Tensor = _joined([layer.weight for layer in layers], dtype)
        self.bias = None if layers[0].bias is None else _joined([layer.bias for layer in layers], dtype)
        self.packed = False

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if not self.packed and rows >= packing.LEAST_ROWS and packing.possible(self.weight, self.weight.dtype):
            self.weight, self.packed = packing.linear(self.weight, rows), True
        if not self.packed:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")


class GatedLinear(nn.Module):
    """x -> value(x) gelu(gate(x)), of the layer that has both, the values first: GEGLU (arXiv:2002.05202, eq. 6).

    On a CPU the GELU and the product are done while the matrix products' results are in its registers.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.weight, self.bias = converted(layer.weight, dtype), converted(layer.bias, dtype)
        self.halves: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if not self.halves and rows >= packing.LEAST_ROWS and packing.possible(self.weight, self.weight.dtype):
            self.halves = [packing.linear(half, rows) for half in self.weight.chunk(2)]
            self.weight = None
        if not self.halves:
            value, gate = F.linear(x, self.weight, self.bias).chunk(2, dim=-1)
            return F.gelu(gate).mul_(value)
        (value, gate), (value_bias, gate_bias) = self.halves, self.bias.chunk(2)
        gates = torch.ops.mkldnn._linear_pointwise.default(x, gate, gate_bias, "gelu", [], "none")
        return torch.ops.mkldnn._linear_pointwise.binary(x, gates, value, value_bias, "mul")


def _joined(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    if len(tensors) == 1:
        return converted(tensors[0], dtype)
    joined = torch.cat([tensor.detach().to(dtype) for tensor in tensors])
    for tensor in tensors:
        let_go(tensor)
    return joined
