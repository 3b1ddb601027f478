"""LCM: Luo et al. 2023, "Latent Consistency Models", arXiv:2310.04378, algorithm 3. For models distilled that way.

Each call jumps to the data at once; all but the last are followed by fresh noise of the next level.
"""

from math import sqrt

from torch import Tensor

from ldm.diffusion.grid import Grid, noise_std, signal
from ldm.diffusion.sampling import AfterStep, Info, Model, Noise, keep, predict_x0

NAME = "lcm"
SPELLINGS = ("LCM", "LCMScheduler", "k_lcm")
PAPER = "arXiv:2310.04378"
ORDER = 0  # it does not follow the flow
STOCHASTIC = True

TIMESTEP_SCALING = 10.0
SIGMA_DATA = 0.5


def calls(grid: Grid) -> int:
    return len(grid)


def sample(model: Model, x: Tensor, grid: Grid, *, noise: Noise, after_step: AfterStep = keep) -> Tensor:
    for i, step in enumerate(grid):
        eps = model(x, step.t)
        x0 = predict_x0(x, eps, step.sigma)
        scaled = TIMESTEP_SCALING * step.t
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)  # eq. 9; the boundary condition of appendix C
        out = scaled / sqrt(scaled**2 + SIGMA_DATA**2)
        data = out * x0 + skip * x
        last = i == len(grid) - 1
        x = data if last else signal(step.next_sigma) * data + noise_std(step.next_sigma) * noise()
        x = after_step(x, Info(index=i, count=len(grid), step=step, eps=eps, x0=x0))
    return x
