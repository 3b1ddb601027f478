"""Random numbers: which generator draws what, and in which order.

Always on the CPU and in float32, so that a seed means the same picture on every device and in every precision. Images have a
generator each, seeded seed + i, so that image i of a batch is the one its own seed makes alone. The order of draws
is the order of calls: the image to start from (the autoencoder's posterior), the noise to start with, then the steps'.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Draws:
    """N(0, 1) for a batch of images, one for each seed."""

    def __init__(self, seeds: Sequence[int], *, one_generator: bool = False, one_posterior: bool = False):
        """one_generator: the first seed alone, drawing for the whole batch. one_posterior: see `posterior`."""
        self.count = len(seeds)
        self.one_posterior = one_posterior
        self._generators = [torch.Generator().manual_seed(seed) for seed in (seeds[:1] if one_generator else seeds)]

    def noise(self, shape: Shape) -> Tensor:
        """(b, *shape), float32."""
        each = self.count // len(self._generators)
        return torch.cat([torch.randn(each, *shape, generator=g) for g in self._generators])

    def posterior(self, shape: Shape) -> Tensor:
        """The same for the autoencoder's posterior, or, with `one_posterior`, one draw for all images."""
        if not self.one_posterior:
            return self.noise(shape)
        return torch.randn(1, *shape, generator=self._generators[0]).expand(self.count, *shape)
