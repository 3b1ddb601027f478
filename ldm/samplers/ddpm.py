"""DDPM: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239, algorithm 2.

Each step draws from the Gaussian that the previous level has, given x and the data the network sees in it. With the smaller
of the paper's two variances, and over any subset of the timesteps.
"""

from math import sqrt

from torch import Tensor

from ldm.diffusion.grid import Grid, signal
from ldm.diffusion.sampling import AfterStep, Info, Model, Noise, keep, predict_x0

NAME = "ddpm"
SPELLINGS = ("DDPM", "DDPMScheduler", "ancestral")
PAPER = "arXiv:2006.11239"
ORDER = 1
STOCHASTIC = True


def calls(grid: Grid) -> int:
    return len(grid)


def sample(model: Model, x: Tensor, grid: Grid, *, noise: Noise, after_step: AfterStep = keep) -> Tensor:
    for i, step in enumerate(grid):
        eps = model(x, step.t)
        x0 = predict_x0(x, eps, step.sigma)
        alpha_bar, alpha_bar_next = signal(step.sigma) ** 2, signal(step.next_sigma) ** 2
        alpha = alpha_bar / alpha_bar_next
        beta, left = 1 - alpha, (1 - alpha_bar_next) / (1 - alpha_bar)
        mean = sqrt(alpha_bar_next) * beta / (1 - alpha_bar) * x0 + sqrt(alpha) * left * x  # eq. 7
        x = mean + sqrt(left * beta) * noise() if left > 0 else mean
        x = after_step(x, Info(index=i, count=len(grid), step=step, eps=eps, x0=x0))
    return x
