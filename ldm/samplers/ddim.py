"""DDIM: Song et al. 2021, "Denoising Diffusion Implicit Models", arXiv:2010.02502.

Each step takes the data and the noise apart as the network sees them and mixes them anew at the next level. eta puts fresh
noise in place of part of the old: 0 is deterministic, 1 is DDPM.
"""

from math import sqrt

from torch import Tensor

from ldm.diffusion.grid import Grid, noise_std, signal
from ldm.diffusion.sampling import AfterStep, Info, Model, Noise, keep, predict_x0

NAME = "ddim"
SPELLINGS = ("DDIM", "DDIMScheduler")
PAPER = "arXiv:2010.02502"
ORDER = 1
STOCHASTIC = False  # unless eta says so


def calls(grid: Grid) -> int:
    return len(grid)


def sample(model: Model, x: Tensor, grid: Grid, *, noise: Noise, after_step: AfterStep = keep, eta: float = 0.0) -> Tensor:
    for i, step in enumerate(grid):
        eps = model(x, step.t)
        x0 = predict_x0(x, eps, step.sigma)
        fresh = eta * _fresh_noise(step.sigma, step.next_sigma)
        old = sqrt(max(noise_std(step.next_sigma) ** 2 - fresh**2, 0.0))
        x = signal(step.next_sigma) * x0 + old * eps  # eq. 12
        if eta > 0:
            x = x + fresh * noise()
        x = after_step(x, Info(index=i, count=len(grid), step=step, eps=eps, x0=x0))
    return x


def _fresh_noise(sigma: float, next_sigma: float) -> float:
    """eq. 16 for eta = 1: the deviation of DDPM's own step."""
    ratio = (signal(sigma) / signal(next_sigma)) ** 2
    return noise_std(next_sigma) / noise_std(sigma) * sqrt(1.0 - ratio)
