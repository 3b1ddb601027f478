"""Linear layers with their weights laid out once, several of one input as one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.fast import packing, products
from ldm.fast.memory import converted, let_go
from ldm.fast.plan import Plan


class Linear(nn.Module):
    """Linear layers of one input as one: (..., in) -> (..., the sum of their outputs).

    On a CPU the weight is packed: for a matrix engine at once (`products.py`), for oneDNN when it is first used.
    """

    def __init__(self, *layers: nn.Linear, plan: Plan):
        super().__init__()
        self.outputs = sum(layer.out_features for layer in layers)
        self.bias = None if layers[0].bias is None else _joined([layer.bias for layer in layers], plan.dtype)
        weights = [layer.weight for layer in layers]
        self.tiled = weights[0].device.type == "cpu" and products.multiplies(layers[0].in_features, plan)
        self.packed = False
        if self.tiled:
            self.weight: Tensor = products.pack([weight[..., None] for weight in weights])
            self.zeros = self.weight.new_zeros(self.outputs) if self.bias is None else None
        else:
            self.weight = _joined(weights, plan.dtype)

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """addend: as the result, which it is added to."""
        if self.tiled:
            bias = self.zeros if self.bias is None else self.bias
            return products.linear(x, self.weight, bias, self.outputs, addend)
        y = self._multiplied(x)
        return y if addend is None else y.add_(addend)

    def _multiplied(self, x: Tensor) -> Tensor:
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

    def __init__(self, layer: nn.Linear, plan: Plan):
        super().__init__()
        self.bias, self.outputs, self.halves = converted(layer.bias, plan.dtype), layer.out_features, []
        fits = layer.out_features % products.PANEL == 0 and products.multiplies(layer.in_features, plan)
        self.tiled = layer.weight.device.type == "cpu" and fits
        if self.tiled:
            self.weight = products.pack([layer.weight[..., None]], gated=True)
            self.bias = products.gated_bias(self.bias)
        else:
            self.weight = converted(layer.weight, plan.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.tiled:
            return products.linear(x, self.weight, self.bias, self.outputs, gated=True)
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
