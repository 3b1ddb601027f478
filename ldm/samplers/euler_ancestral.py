"""Euler ancestral: Euler to a lower level than the next one, then fresh noise up to it.

From k-diffusion (Crowson 2022); the split of the next level's variance is DDPM's (arXiv:2006.11239, eq. 7) in units of the
data: sigma_up^2 + sigma_down^2 = next_sigma^2.
"""

from math import sqrt

from torch import Tensor

from ldm.diffusion.grid import Grid, signal
from ldm.diffusion.sampling import AfterStep, Info, Model, Noise, keep, predict_x0

NAME = "euler_ancestral"
SPELLINGS = ("Euler a", "k_euler_a", "k_euler_ancestral", "EulerAncestralDiscreteScheduler", "sample_euler_ancestral")
PAPER = "arXiv:2206.00364"
ORDER = 1
STOCHASTIC = True


def calls(grid: Grid) -> int:
    return len(grid)


def sample(model: Model, x: Tensor, grid: Grid, *, noise: Noise, after_step: AfterStep = keep) -> Tensor:
    for i, step in enumerate(grid):
        sigma, target = step.sigma, step.next_sigma
        eps = model(x, step.t)
        x0 = predict_x0(x, eps, sigma)
        up = min(target, target * sqrt(sigma**2 - target**2) / sigma)
        down = sqrt(target**2 - up**2)
        data_units = x / signal(sigma) + (down - sigma) * eps
        if up > 0:
            data_units = data_units + up * noise()
        x = data_units * signal(target)
        x = after_step(x, Info(index=i, count=len(grid), step=step, eps=eps, x0=x0))
    return x
