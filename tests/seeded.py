"""Seeded random weights and inputs: the same numbers in every process and on every machine, for any model.

A tensor's values depend on its name, its shape and the seed only, so that a reference implementation and ours can be
filled apart from one another. No layer is left trivial: norms have gains about 1 and offsets about 0, both uneven, and the
layers that training starts from zero are as random as the others, so that a forgotten or misplaced tensor shows.
"""

import zlib

import numpy as np
import torch
from torch import Tensor, nn


def values(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Standard normal numbers, float32."""
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    return generator.standard_normal(shape, dtype=np.float32)


def tensor(name: str, *shape: int, seed: int = 0) -> Tensor:
    """The same as a torch tensor, for inputs."""
    return torch.from_numpy(values(name, shape, seed))


def weight(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """A plausible parameter: a gain (1-d weight), an offset or embedding vector (other 1-d), or a matrix or kernel that
    keeps the variance of what passes through it."""
    normal = torch.from_numpy(values(name, shape, seed))
    if len(shape) == 1 and name.endswith("weight"):
        return normal.mul_(0.1).add_(1.0)
    if len(shape) == 1:
        return normal.mul_(0.1)
    if "embedding.weight" in name or "embeds" in name:
        return normal.mul_(0.5)
    return normal.mul_((normal[0].numel()) ** -0.5)


@torch.no_grad()
def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and buffer of `module` its seeded value, in place."""
    for name, held in module.state_dict().items():
        if held.is_floating_point():
            held.copy_(weight(name, tuple(held.shape), seed))
    return module.eval()
