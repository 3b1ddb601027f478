"""Heun: Karras et al. 2022, arXiv:2206.00364, algorithm 1.

Euler to the next level, then the step again with the mean of the slopes at both ends. Two calls a step; one where the next
level has no noise, since the slope there is not defined.
"""

from torch import Tensor

from ldm.diffusion.grid import Grid, Step
from ldm.diffusion.sampling import AfterStep, Info, Model, Noise, keep, move, predict_x0

NAME = "heun"
SPELLINGS = ("Heun", "k_heun", "HeunDiscreteScheduler", "sample_heun")
PAPER = "arXiv:2206.00364"
ORDER = 2
STOCHASTIC = False


def calls(grid: Grid) -> int:
    return sum(2 if _corrects(step) else 1 for step in grid)


def sample(model: Model, x: Tensor, grid: Grid, *, noise: Noise, after_step: AfterStep = keep) -> Tensor:
    for i, step in enumerate(grid):
        eps = model(x, step.t)
        x0, slope = predict_x0(x, eps, step.sigma), eps
        if _corrects(step):
            ahead = model(move(x, eps, step.sigma, step.next_sigma), step.next_t)
            slope = (eps + ahead) / 2
        x = move(x, slope, step.sigma, step.next_sigma)
        x = after_step(x, Info(index=i, count=len(grid), step=step, eps=eps, x0=x0))
    return x


def _corrects(step: Step) -> bool:
    return step.next_sigma > 0 and step.next_t is not None
