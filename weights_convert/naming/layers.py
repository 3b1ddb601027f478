"""The rows that every naming table is written in.

A table lists a model's layers, one a line, with the layer's name in each naming side by side:

    # native            CompVis          diffusers         layer
    ("norm1",           "in_layers.0",   "norm1",          norm(width)),

`under` puts such a list below a prefix, again one for each naming. `Layer` turns into the tensors it holds: their native
shapes, and the few that some naming stores in another arrangement.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

# How a naming may arrange a tensor, seen from the native one of shape (out, in) or (d,).
PLAIN = "plain"  # as it is
POINTWISE = "pointwise"  # a linear layer kept as a 1x1 convolution: (out, in, 1, 1)
TRANSPOSED = "transposed"  # a matrix that multiplies from the right: (in, out)
QUERY, KEY, VALUE = "query", "key", "value"  # one third of the rows of a fused projection, in this order


@dataclass(frozen=True)
class Parameter:
    """One tensor of a layer: its name within the layer, native shape, and arrangement in the namings that differ."""

    name: str
    shape: tuple[int, ...]
    arrangements: Mapping[str, str] = field(default_factory=dict)


Layer = tuple[Parameter, ...]
Line = tuple  # (name in naming 1, name in naming 2, ..., Layer)


def norm(width: int) -> Layer:
    """Gain and offset of a group or layer normalisation."""
    return Parameter("weight", (width,)), Parameter("bias", (width,))


def convolution(inputs: int, outputs: int, kernel: int = 3, bias: bool = True) -> Layer:
    """A square convolution."""
    weight = Parameter("weight", (outputs, inputs, kernel, kernel))
    return (weight, Parameter("bias", (outputs,))) if bias else (weight,)


def linear(inputs: int, outputs: int, bias: bool = True, **arrangements: str) -> Layer:
    """A linear layer; `arrangements` gives, by naming, how its weight is kept where that is not (outputs, inputs)."""
    weight = Parameter("weight", (outputs, inputs), arrangements)
    return (weight, Parameter("bias", (outputs,))) if bias else (weight,)


def tensor(*shape: int, **arrangements: str) -> Layer:
    """A bare tensor, named by the line itself."""
    return (Parameter("", shape, arrangements),)


def under(prefixes: tuple[str, ...], lines: Iterable[Line]) -> list[Line]:
    """The lines with every naming's prefix put before its names."""
    return [(*(".".join(filter(None, pair)) for pair in zip(prefixes, line[:-1], strict=True)), line[-1]) for line in lines]
