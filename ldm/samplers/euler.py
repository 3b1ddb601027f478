"""Euler: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv:2206.00364, algorithm 1
without its second evaluation.

In units of the data, x / signal, the flow is dx / dsigma = eps; each step follows it straight.
"""

from torch import Tensor

from ldm.diffusion.grid import Grid
from ldm.diffusion.sampling import AfterStep, Info, Model, Noise, keep, move, predict_x0

NAME = "euler"
SPELLINGS = ("Euler", "k_euler", "EulerDiscreteScheduler", "sample_euler")
PAPER = "arXiv:2206.00364"
ORDER = 1
STOCHASTIC = False


def calls(grid: Grid) -> int:
    return len(grid)


def sample(model: Model, x: Tensor, grid: Grid, *, noise: Noise, after_step: AfterStep = keep) -> Tensor:
    for i, step in enumerate(grid):
        eps = model(x, step.t)
        x0 = predict_x0(x, eps, step.sigma)
        x = move(x, eps, step.sigma, step.next_sigma)
        x = after_step(x, Info(index=i, count=len(grid), step=step, eps=eps, x0=x0))
    return x
