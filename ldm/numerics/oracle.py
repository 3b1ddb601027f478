"""Data whose denoising is known in closed form, so that a sampler is judged without any weights.

For Gaussian or mixture data the best possible eps(x, t) and the exact solution of the probability-flow ODE (Song et al.
2021, arXiv:2011.13456, section 4.3) are formulas. Elements are independent, so any shape will do. In units of the data,
u = x / signal(sigma), the noised density at level sigma is the data's, each component widened to variance s^2 + sigma^2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.grid import signal
from ldm.diffusion.spacing import sigma_at


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A mixture of Gaussians, for every element alike. One component is the Gaussian."""

    weights: tuple[float, ...] = (1.0,)
    means: tuple[float, ...] = (0.0,)
    deviations: tuple[float, ...] = (1.0,)

    def eps(self, x: Tensor, sigma: float) -> Tensor:
        """The expected noise in x at level sigma: -sigma times the score of the noised density."""
        u = (x / signal(sigma))[..., None]
        variance = self._like(x, self.deviations) ** 2 + sigma**2
        distance = u - self._like(x, self.means)
        log_density = self._like(x, self.weights).log() - 0.5 * variance.log() - 0.5 * distance**2 / variance
        return sigma * (log_density.softmax(dim=-1) * distance / variance).sum(dim=-1)

    def solve(self, x: Tensor, sigma: float, end: float) -> Tensor:
        """Where the flow takes x from level sigma to level `end`, exactly.

        In one dimension the flow keeps the order of points, and so each point's quantile: this finds the point of the same
        quantile at the other level, by bisection to the last bit. x must be float64.
        """
        quantile = self._log_odds(x / signal(sigma), sigma)
        reach = max(map(abs, self.means)) + 12 * math.hypot(max(self.deviations), max(sigma, end))
        low, high = torch.full_like(x, -reach), torch.full_like(x, reach)
        for _ in range(80):
            middle = (low + high) / 2
            below = self._log_odds(middle, end) < quantile
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2 * signal(end)

    def _log_odds(self, u: Tensor, sigma: float) -> Tensor:
        """log(F / (1 - F)) of the noised distribution function F, precise in both tails."""
        deviation = (self._like(u, self.deviations) ** 2 + sigma**2).sqrt()
        z = (u[..., None] - self._like(u, self.means)) / deviation
        weights = self._like(u, self.weights).log()
        below = (weights + torch.special.log_ndtr(z)).logsumexp(dim=-1)
        above = (weights + torch.special.log_ndtr(-z)).logsumexp(dim=-1)
        return below - above

    def _like(self, x: Tensor, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=x.dtype, device=x.device)


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """A perfect network for the mixture, asked as a sampler asks: `oracle(x, t)`. `sigmas` is the table at every timestep.

    It takes t at its word: asked with a timestep that is not x's own level, it answers wrongly, as a network would.
    """

    data: Mixture
    sigmas: tuple[float, ...]
    logarithmic: bool = True

    def __call__(self, x: Tensor, t: float) -> Tensor:
        return self.data.eps(x, sigma_at(t, self.sigmas, logarithmic=self.logarithmic))
