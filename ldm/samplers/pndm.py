"""PNDM without its Runge-Kutta start, also called PLMS: Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on
Manifolds", arXiv:2202.09778. The sampler Stable Diffusion v1 was released with.

Adams-Bashforth coefficients on the last four evaluations of eps, put through DDIM's transfer instead of a straight step. The
first step is taken twice: once to see eps at its end, then again with the mean of both.
"""

from torch import Tensor

from ldm.diffusion.grid import Grid
from ldm.diffusion.sampling import AfterStep, Info, Model, Noise, keep, move, predict_x0

NAME = "pndm"
SPELLINGS = ("PLMS", "PNDM", "PNDMScheduler", "plms")
PAPER = "arXiv:2202.09778"
ORDER = 2
STOCHASTIC = False

# eq. 12 and its lower orders: weights of eps, newest first.
WEIGHTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def calls(grid: Grid) -> int:
    return len(grid) + (grid.steps[0].next_t is not None)


def sample(model: Model, x: Tensor, grid: Grid, *, noise: Noise, after_step: AfterStep = keep) -> Tensor:
    history: list[Tensor] = []  # eps, newest first
    for i, step in enumerate(grid):
        eps = model(x, step.t)
        x0 = predict_x0(x, eps, step.sigma)
        history = [eps, *history[:3]]
        slope = sum(weight * past for weight, past in zip(WEIGHTS[len(history) - 1], history, strict=True))
        if i == 0 and step.next_t is not None:
            trial = grid.trial or step
            ahead = model(move(x, eps, trial.sigma, trial.next_sigma), step.next_t)
            slope = (eps + ahead) / 2
        x = move(x, slope, step.sigma, step.next_sigma)
        x = after_step(x, Info(index=i, count=len(grid), step=step, eps=eps, x0=x0))
    return x
